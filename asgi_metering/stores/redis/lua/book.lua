-- One account while an operation works on it: burn order, holding, spending, giving back, debt. Mirrors rules/book.py.
-- Every change of a script is collected and written at its end, all at once.

local prefix = sub(KEYS[1], 1, -5)

-- What is to be written: texts by key, ledger lines, closed grants, indexes.
local sets, lines, closed = {}, {}, {}

local function put(key, text)
  sets[#sets + 1] = key
  sets[#sets + 1] = text
end

-- granted, settled, held, expired, debt, entries, next change, next due, seen; then a line for each open grant.
local SUMS = '^(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+)(.*)$'
-- (amount, priority, begins, ends, number), settled, held, expired, begun, (reversed, id, the rest)
local GRANT = '^((%S+)\t(%S+)\t(%S+)\t(%S+)\t(%S+))\t(%S+)\t(%S+)\t(%S+)\t(%S)\t((%S+)\t([^\t]*).*)$'

local function free(grant)
  return grant.amount - grant.settled - grant.held - grant.expired - grant.reversed
end

local function is_open(grant)
  return grant.settled + grant.expired + grant.reversed < grant.amount
end

local function available(book)
  return book.granted - book.settled - book.expired - book.held
end

-- The open grants, in burn order: they are kept in it.
local function grants(book)
  local list = book.list
  if list then
    return list
  end
  list = {}
  for line in gmatch(book.rest, '[^\n]+') do
    local first, amount, priority, begins, ends, number, settled, held, expired, begun, last, reversed, id =
      match(line, GRANT)
    list[#list + 1] = {
      text = line,
      amount = tonumber(amount),
      begins = tonumber(begins),
      ends = tonumber(ends),
      settled = tonumber(settled),
      held = tonumber(held),
      expired = tonumber(expired),
      begun = begun == '1',
      reversed = tonumber(reversed),
      id = id,
      -- What never changes, as it is written; what only orders grants that begin together.
      first = first,
      last = last,
      priority = priority,
      number = number,
    }
  end
  book.list = list
  return list
end

local function touch(grant)
  grant.text = nil
end

local function grant_text(grant)
  if not grant.text then
    grant.text = concat({
      grant.first, int(grant.settled), int(grant.held), int(grant.expired), grant.begun and '1' or '0', grant.last,
    }, '\t')
  end
  return grant.text
end

-- Add a ledger line; `rest` is what follows its amount up to what is available, `parts` its parts as JSON.
local function write(book, kind, amount, ref, line, basis, estimated, parts)
  book.entries = book.entries + 1
  lines[#lines + 1] = {
    book = book,
    ref = ref,
    number = int(book.entries),
    text = concat({
      '[' .. int(book.entries), book.now_text, '"' .. kind .. '"', int(amount), ref, line or '""',
      basis or 'null', estimated or 'false', int(available(book)), '""', parts or '[]', '""]',
    }, ','),
  }
  return int(book.entries)
end

local function pay_debt(book, grant)
  local paid = math.min(free(grant), book.debt)
  if paid > 0 then
    touch(grant)
    grant.settled = grant.settled + paid
    book.debt = book.debt - paid
    write(book, 'debt_payment', paid, grant.id)
  end
end

local function is_spendable(book, grant)
  return grant.begun and grant.ends > book.now and is_open(grant) and free(grant) > 0
end

local function began_before(one, other)
  if one.begins ~= other.begins then
    return one.begins < other.begins
  end
  if one.priority ~= other.priority then
    return tonumber(one.priority) < tonumber(other.priority)
  end
  if one.ends ~= other.ends then
    return one.ends < other.ends
  end
  return tonumber(one.number) < tonumber(other.number)
end

local function mature(book)
  local beginning = {}
  for _, grant in ipairs(grants(book)) do
    if not grant.begun and grant.begins <= book.now then
      beginning[#beginning + 1] = grant
    end
  end
  table.sort(beginning, began_before)
  for _, grant in ipairs(beginning) do
    book.granted = book.granted + grant.amount
    touch(grant)
    grant.begun = true
    pay_debt(book, grant)
  end
  for _, grant in ipairs(grants(book)) do
    if is_open(grant) and grant.begun and grant.ends <= book.now and free(grant) > 0 then
      local lapsed = free(grant)
      touch(grant)
      grant.expired = grant.expired + lapsed
      book.expired = book.expired + lapsed
      write(book, 'expire', lapsed, grant.id)
    end
  end
end

-- The account kept under `key`, by the words of its sums; one that nobody touched yet is all zeros.
local function open_book(key, told, now, now_text)
  local book = { key = key, now = now, now_text = now_text, is_new = not told, told = told }
  if told then
    book.granted, book.settled, book.held = tonumber(told[1]), tonumber(told[2]), tonumber(told[3])
    book.expired, book.debt, book.entries = tonumber(told[4]), tonumber(told[5]), tonumber(told[6])
    book.change, book.due, book.rest = tonumber(told[7]), tonumber(told[8]), told[10]
  else
    book.granted, book.settled, book.held, book.expired, book.debt, book.entries = 0, 0, 0, 0, 0, 0
    book.change, book.due, book.rest = INF, INF, ''
  end
  if now >= book.change then
    book.is_rescheduled = true
    mature(book)
  end
  return book
end

local function next_change(book)
  local first = INF
  for _, grant in ipairs(grants(book)) do
    if is_open(grant) then
      if not grant.begun then
        first = math.min(first, grant.begins)
      elseif grant.ends > book.now then
        first = math.min(first, grant.ends)
      end
    end
  end
  return first
end

-- Set `amount` aside; what grants do not have is held as debt to come. Returns parts, each {source, start, amount, name}.
local function book_hold(book, amount, parts)
  local left = amount
  if left > 0 then
    for _, grant in ipairs(grants(book)) do
      if is_spendable(book, grant) then
        local take = math.min(free(grant), left)
        touch(grant)
        grant.held = grant.held + take
        parts[#parts + 1] = { 'grant', '0.0', take, grant.id }
        left = left - take
        if left == 0 then
          break
        end
      end
    end
  end
  if left > 0 then
    parts[#parts + 1] = { 'debt', '0.0', left, '""' }
  end
  book.held = book.held + amount
end

-- Spend without a hold: free grants in burn order, then debt.
local function spend(book, amount, spent)
  local left = amount
  for _, grant in ipairs(grants(book)) do
    if is_spendable(book, grant) then
      local take = math.min(free(grant), left)
      touch(grant)
      grant.settled = grant.settled + take
      spent[#spent + 1] = { 'grant', '0.0', take, grant.id }
      left = left - take
      if left == 0 then
        break
      end
    end
  end
  if left > 0 then
    book.debt = book.debt + left
    spent[#spent + 1] = { 'debt', '0.0', left, '""' }
  end
  book.settled = book.settled + amount
end

local function grant_of(book, id)
  for _, grant in ipairs(grants(book)) do
    if grant.id == id then
      return grant
    end
  end
end

-- Spend `amount` of held parts in their order and give back what is left; false if a part's grant is not open any more.
local function settle(book, parts, amount, spent)
  local left = amount
  for _, part in ipairs(parts) do
    local held = part[3]
    local take = math.min(held, left)
    left = left - take
    if part[1] == 'debt' then
      book.held = book.held - held
      left = left + take
    else
      local grant = grant_of(book, part[4])
      if not grant then
        return false
      end
      local lapsed = grant.ends <= book.now and held - take or 0
      touch(grant)
      grant.settled = grant.settled + take
      grant.held = grant.held - held
      grant.expired = grant.expired + lapsed
      book.held = book.held - held
      book.settled = book.settled + take
      if lapsed > 0 then
        book.expired = book.expired + lapsed
        write(book, 'expire', lapsed, grant.id)
      end
      if take > 0 then
        spent[#spent + 1] = { 'grant', part[2], take, part[4] }
      end
    end
  end
  if left > 0 then
    spend(book, left, spent)
  end
  if book.debt > 0 then
    for _, grant in ipairs(grants(book)) do
      if is_spendable(book, grant) then
        pay_debt(book, grant)
      end
    end
  end
  return true
end

-- The account is to be written; `due`, with its text, is when a new hold of it falls due.
local function close_book(book, due, due_text)
  local list = book.list
  local rest = book.rest
  if list then
    local open = { '' }
    for _, grant in ipairs(list) do
      if is_open(grant) then
        open[#open + 1] = grant_text(grant)
      else
        closed[#closed + 1] = { book, grant.id, grant_text(grant) }
      end
    end
    rest = concat(open, '\n')
  end
  -- To write a number costs more than all else here: what has not changed stays as it was written.
  local told = book.told or {}
  if book.is_rescheduled or not book.told then
    told[1], told[7] = int(book.granted), flt(book.is_rescheduled and next_change(book) or book.change)
  end
  if lines[1] or not book.told then
    told[2], told[4], told[5], told[6] = int(book.settled), int(book.expired), int(book.debt), int(book.entries)
  end
  told[3] = int(book.held)
  if due < book.due then
    told[8] = due_text
  elseif not book.told then
    told[8] = 'inf'
  end
  told[9], told[10] = book.now_text, nil
  put(book.key, concat(told, '\t') .. rest)
  book.is_written = true
end

-- Whether the sums are still exact; beyond, nothing is written.
local function is_exact(book)
  return math.max(book.granted, book.settled, book.held, book.expired, book.debt) <= MAX_AMOUNT
end

-- Write everything that was collected.
local function flush()
  if #sets > 0 then
    call('MSET', unpack(sets))
  end
  for _, one in ipairs(closed) do
    call('HSET', prefix .. 'G:' .. sub(one[1].key, #prefix + 3), one[2], one[3])
  end
  for _, line in ipairs(lines) do
    local book = line.book
    if book.is_written then
      local rest = sub(book.key, #prefix + 3)
      if call('RPUSH', prefix .. 'e:' .. rest, line.text) == 1 then
        call('ZADD', prefix .. 'z:lines', book.now_text, rest)
      end
      call('ZADD', prefix .. 'r:' .. rest, 0, line.ref .. GLUE .. line.number)
    end
  end
end

local function note_account(book)
  if book.is_new then
    call('ZADD', prefix .. 'z:accounts', 0, sub(book.key, #prefix + 3))
  end
end
