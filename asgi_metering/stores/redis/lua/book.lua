-- Accounts while calls work on them: burn order, holding, spending, giving back, debt. Mirrors rules/book.py.
-- A book is read once for all calls of a script, and written once, at its end.

CODE.KIND_SETTLE, CODE.KIND_EXPIRE, CODE.KIND_DEBT_PAYMENT = 1, 2, 3

-- Of what nearly every call needs: a field costs as much as a number that is packed.
local AS_BOOK, AS_PART, AS_WINDOW, AS_HOLD, AS_NEW_HOLD = AS.BOOK, AS.PART, AS.WINDOW, AS.HOLD, AS.NEW_HOLD
local AS_RECEIPT, AS_NEW_ENTRY, AS_NEW_EVENT = AS.RECEIPT, AS.NEW_ENTRY, AS.NEW_EVENT
local ACCOUNT_SIZE, NEW_HOLD_SIZE, PARTS_AT, MAX_AMOUNT = CODE.ACCOUNT_SIZE, CODE.NEW_HOLD_SIZE, CODE.PARTS_AT, CODE.MAX_AMOUNT
local FROM_GRANT, KIND_SETTLE = CODE.FROM_GRANT, CODE.KIND_SETTLE

-- What every call has to do with, and so a local. Rows by key, as the calls before left them, `false` for none; books by
-- account; the first ledger line to come of an account, and all of them where these are several.
local rows, books, lines, more_lines
-- Whether anything is gone, which is rare. What all keys begin with, those of accounts too, and the script's time.
local is_gone, prefix, before_account, now_is
-- Lists that are filled anew by each script, and how much of them is of this one: a list that grows from nothing costs as
-- much as what it holds. What is to be written, keys and texts by turns, and the place of each key's text; calls that
-- have ended, by their time; events and, in their order, the ids of these.
local sets, n_sets, place_of, ended, n_ended, events, event_ids, n_events = {}, 0, nil, {}, 0, {}, {}, 0
-- Calls that live from now on, four fields for the first one of each account, and those that live no more, two; by account
-- the place before these, and where there are several all of them.
local lived, n_lived, live, more_live, left, n_left, ended_live, more_left = {}, 0, nil, nil, {}, 0, nil, nil
-- Of calls that end, by the place of their keys: the account that holds for them and its key, as far as they are read.
local whose, whose_key = {}, {}

-- What a script has read and is to write when all its calls are through.
local function nothing_yet(gate)
  rows, books, lines, more_lines, is_gone = {}, {}, {}, {}, false
  n_sets, place_of, n_ended, n_events = 0, {}, 0, 0
  n_lived, live, more_live, n_left, ended_live, more_left = 0, {}, {}, 0, {}, {}
  prefix, now_is = sub(gate, 1, -5), 0
  before_account = prefix .. 'a:'
  work = {
    gate = gate, is_begun = false,
    -- What is gone, with its index; what goes by itself, and in how many milliseconds.
    gone = {}, fading = {},
    -- What few calls leave behind, by what it is.
    rare = false,
  }
end

-- Everything is written: the next script finds nothing of it.
local function nothing_left()
  rows, books, n_sets, place_of = {}, {}, 0, {}
  work.rare, work.is_begun = false, false
end

-- Of what few calls leave behind: `refs` of ledger lines and allowances' `windows`, by account; leases in `pools`; and
-- `past`, scores and members by index.
local function rare_of(what)
  local rare = work.rare or {}
  work.rare = rare
  local known = rare[what] or {}
  rare[what] = known
  return known
end

function M.begin(its_keys, its_args)
  keys, args, call = its_keys, its_args, redis.call
  if not work or work.is_begun or work.gate ~= keys[1] then
    nothing_yet(keys[1])
  end
  work.is_begun = true
end

local function fetch(key)
  local text = rows[key]
  if text == nil then
    text = call('GET', key)
    rows[key] = text
  end
  return text
end
M.fetch = fetch

local function put(key, text)
  local place = place_of[key]
  rows[key] = text
  if place then
    sets[place] = text
  else
    place = n_sets + 2
    sets[place - 1], sets[place], place_of[key], n_sets = key, text, place, place
  end
  -- A key that is set to nothing takes a place in a table all the same.
  if is_gone and work.gone[key] then
    work.gone[key] = nil
  end
end
M.put = put

function M.drop(key, index)
  local place = place_of[key]
  if place then
    -- What was to be written last takes its place.
    local last = sets[n_sets - 1]
    sets[place - 1], sets[place], place_of[last], n_sets = last, sets[n_sets], place, n_sets - 2
    place_of[key] = nil
  end
  rows[key], work.gone[key], is_gone = false, index, true
end

-- What follows the letter of a key.
local function rest(key)
  return sub(key, #prefix + 3)
end
M.rest = rest

-- The book of an account whose row has this key; its list is that of its grants.
local function book_of(account, key)
  local book = books[account]
  if book then
    return book
  end
  key = key or before_account .. account
  local text = fetch(key)
  local granted, settled, held, expired, debt, entries, seen, at = 0, 0, 0, 0, 0, 0, 0, 1
  local change, due = CODE.INF, CODE.INF
  if text then
    granted, settled, held, expired, debt, entries, change, due, seen, at = parse(AS.ACCOUNT, text)
  end
  -- All fields at once, here and below: a table that grows field by field costs several times as much. No more than 16,
  -- the next one would double its room: what most books are not, matured or due at another time, is no field.
  book = {
    nil, account = account, key = key, granted = granted, settled = settled, held = held, expired = expired, debt = debt,
    entries = entries, change = change, due = due, now = seen, seen = seen, at = at, text = text or '',
    is_moved = place_of[key] ~= nil,
  }
  books[account] = book
  return book
end
M.book_of = book_of

-- A grant is the list of what its row was taken apart into, which costs half of a table with names; the last of them is
-- where the next one begins.
local AMOUNT, PRIORITY, BEGINS, ENDS, NUMBER, SETTLED, HELD, EXPIRED, BEGUN, REVERSED, ID, REST, NEXT =
  1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13

local function free(grant)
  return grant[AMOUNT] - grant[SETTLED] - grant[HELD] - grant[EXPIRED] - grant[REVERSED]
end

local function is_open(grant)
  return grant[SETTLED] + grant[EXPIRED] + grant[REVERSED] < grant[AMOUNT]
end

local function available(book)
  return book.granted - book.settled - book.expired - book.held
end

-- The grant at a place in burn order, which is that of the row; read when it is first asked for.
local function grant_at(book, place)
  local grant = book[place]
  if not grant and book.at <= #book.text then
    grant = { parse(AS.GRANT, book.text, book.at) }
    book[place], book.at = grant, grant[NEXT]
  end
  return grant
end

function M.grant_text(grant)
  local amount, priority, begins, ends, number, settled, held, expired, begun, reversed, id, rest = unpack(grant)
  return pack(
    AS.GRANT, amount, priority, begins, ends, number, settled, held, expired, begun, reversed, #id, id, #rest, rest
  )
end

-- The row, and the closed grants, which are no part of it: ids and texts, or nothing.
function M.book_text(book)
  local only, at = book[1], book.at
  if only and not book[2] and is_open(only) then
    -- Of most accounts: one grant.
    local amount, priority, begins, ends, number, settled, held, expired, begun, reversed, id, rest = unpack(only)
    local text = pack(
      AS.BOOK, book.granted, book.settled, book.held, book.expired, book.debt, book.entries, book.change, book.due,
      book.seen, amount, priority, begins, ends, number, settled, held, expired, begun, reversed, #id, id, #rest, rest
    )
    return at > #book.text and text or text .. sub(book.text, at)
  end
  local texts, closed = '', nil
  for i = 1, #book do
    local grant = book[i]
    local text = M.grant_text(grant)
    if is_open(grant) then
      texts = texts .. text
    else
      closed = closed or {}
      closed[#closed + 1] = grant[ID]
      closed[#closed + 1] = text
    end
  end
  return pack(
    AS.ACCOUNT, book.granted, book.settled, book.held, book.expired, book.debt, book.entries, book.change, book.due,
    book.seen
  ) .. texts .. sub(book.text, at), closed
end

local function keep_line(account, text)
  local first, all = lines[account], more_lines[account]
  if not first then
    lines[account] = text
  elseif not all then
    more_lines[account] = { first, text }
  else
    all[#all + 1] = text
  end
end

-- Add a ledger line. Returns its number. A settlement's line is found by its hold, which has the number: the index gets
-- it when the hold is forgotten.
function M.write(book, kind, amount, ref, line, basis, estimated, parts)
  local account, number = book.account, book.entries + 1
  book.entries = number
  keep_line(account, pack(
    AS.NEW_ENTRY, kind, basis, estimated, number, book.now, amount, available(book), #ref, ref, #line, line, #parts,
    parts, 0, 0
  ))
  if kind ~= CODE.KIND_SETTLE then
    local refs = rare_of('refs')
    local index = refs[account] or {}
    refs[account] = index
    index[#index + 1] = 0
    index[#index + 1] = ref .. CODE.GLUE .. string.format('%.0f', number)
  end
  return number
end

function M.pay_debt(book, grant)
  local paid = min(free(grant), book.debt)
  if paid > 0 then
    grant[SETTLED] = grant[SETTLED] + paid
    book.debt = book.debt - paid
    M.write(book, CODE.KIND_DEBT_PAYMENT, paid, grant[ID], '', 0, 0, '')
  end
end

-- What of a grant can be spent now; nothing, or less, of one that has not begun or is over.
local function spendable(book, grant)
  if grant[BEGUN] == 1 and grant[ENDS] > book.now then
    return grant[AMOUNT] - grant[SETTLED] - grant[HELD] - grant[EXPIRED] - grant[REVERSED]
  end
  return 0
end

function M.began_before(one, other)
  for _, field in ipairs({ BEGINS, PRIORITY, ENDS }) do
    if one[field] ~= other[field] then
      return one[field] < other[field]
    end
  end
  return one[NUMBER] < other[NUMBER]
end

function M.grants(book)
  repeat
    local more = grant_at(book, #book + 1)
  until not more
  return book
end

function M.next_change(book)
  local first = CODE.INF
  for _, grant in ipairs(M.grants(book)) do
    if is_open(grant) then
      if grant[BEGUN] == 0 then
        first = min(first, grant[BEGINS])
      elseif grant[ENDS] > book.now then
        first = min(first, grant[ENDS])
      end
    end
  end
  return first
end

-- Begin grants whose time has come, in the order of their beginning, and lapse what is free of those that are over.
function M.mature(book)
  local beginning = {}
  for _, grant in ipairs(M.grants(book)) do
    if grant[BEGUN] == 0 and grant[BEGINS] <= book.now then
      beginning[#beginning + 1] = grant
    end
  end
  table.sort(beginning, M.began_before)
  for _, grant in ipairs(beginning) do
    book.granted = book.granted + grant[AMOUNT]
    grant[BEGUN] = 1
    M.pay_debt(book, grant)
  end
  for _, grant in ipairs(book) do
    if is_open(grant) and grant[BEGUN] == 1 and grant[ENDS] <= book.now and free(grant) > 0 then
      local lapsed = free(grant)
      grant[EXPIRED] = grant[EXPIRED] + lapsed
      book.expired = book.expired + lapsed
      M.write(book, CODE.KIND_EXPIRE, lapsed, grant[ID], '', 0, 0, '')
    end
  end
end

-- The book as of `now`; nothing if it has to be written before that.
function M.book_at(account, now)
  local book = M.book_of(account)
  book.now = now
  if now >= book.change then
    if book.is_moved then
      return nil
    end
    book.is_matured = true
    M.mature(book)
  end
  return book
end

-- Nobody takes from the book after all: what it would have written down by itself is not written.
function M.forget(book)
  if book.is_matured and not book.is_moved then
    local account = book.account
    lines[account], more_lines[account], rare_of('refs')[account], books[account] = nil, nil, nil, nil
    local again = M.book_of(account)
    again.due, again.is_due_new = book.due, book.is_due_new
  end
end

-- Set `amount` aside; what grants do not have is held as debt to come. Returns where it came from, as parts.
function M.book_hold(book, amount)
  local left, place, parts = amount, 1, ''
  local first = left > 0 and grant_at(book, 1)
  if first and spendable(book, first) >= left then
    -- Of most calls: one grant, which has enough.
    first[HELD], book.held = first[HELD] + left, book.held + left
    return pack(AS.PART, CODE.FROM_GRANT, 0, left, #first[ID], first[ID])
  end
  while left > 0 do
    local grant = grant_at(book, place)
    if not grant then
      parts = parts .. pack(AS.PART, CODE.FROM_DEBT, 0, left, 0, '')
      break
    end
    local take = min(spendable(book, grant), left)
    if take > 0 then
      grant[HELD] = grant[HELD] + take
      parts = parts .. pack(AS.PART, CODE.FROM_GRANT, 0, take, #grant[ID], grant[ID])
      left = left - take
    end
    place = place + 1
  end
  book.held = book.held + amount
  return parts
end

-- Spend without a hold: free grants in burn order, then debt.
function M.spend(book, amount, spent)
  local left, place = amount, 1
  while left > 0 do
    local grant = grant_at(book, place)
    if not grant then
      book.debt = book.debt + left
      spent[#spent + 1] = pack(AS.PART, CODE.FROM_DEBT, 0, left, 0, '')
      break
    end
    local take = min(spendable(book, grant), left)
    if take > 0 then
      grant[SETTLED] = grant[SETTLED] + take
      spent[#spent + 1] = pack(AS.PART, CODE.FROM_GRANT, 0, take, #grant[ID], grant[ID])
      left = left - take
    end
    place = place + 1
  end
  book.settled = book.settled + amount
end

function M.grant_of(book, id)
  local place = 1
  repeat
    local grant = grant_at(book, place)
    if grant and grant[ID] == id then
      return grant
    end
    place = place + 1
  until not grant
end

-- Spend `take` of what a grant holds for a call, and give back the rest; false if the grant is not open any more.
function M.settle_grant(book, id, held, take)
  local grant = M.grant_of(book, id)
  if not grant then
    return false
  end
  book.held, book.settled = book.held - held, book.settled + take
  grant[HELD], grant[SETTLED] = grant[HELD] - held, grant[SETTLED] + take
  local lapsed = grant[ENDS] <= book.now and held - take or 0
  if lapsed > 0 then
    grant[EXPIRED] = grant[EXPIRED] + lapsed
    book.expired = book.expired + lapsed
    M.write(book, CODE.KIND_EXPIRE, lapsed, grant[ID], '', 0, 0, '')
  end
  return true
end

-- Spend `amount` of held parts in their order and give back what is left; false if a part's grant is not open any more.
function M.settle(book, parts, amount, spent)
  local left = amount
  for _, part in ipairs(parts) do
    local held = part.amount
    local take = min(held, left)
    left = left - take
    if part.source == CODE.FROM_DEBT then
      book.held = book.held - held
      left = left + take
    elseif not M.settle_grant(book, part.name, held, take) then
      return false
    elseif take > 0 then
      spent[#spent + 1] = pack(AS.PART, CODE.FROM_GRANT, part.start, take, #part.name, part.name)
    end
  end
  if left > 0 then
    M.spend(book, left, spent)
  end
  if book.debt > 0 then
    for _, grant in ipairs(M.grants(book)) do
      if spendable(book, grant) > 0 then
        M.pay_debt(book, grant)
      end
    end
  end
  return true
end

-- The book is to be written; `due` is when a new hold of it falls due.
function M.close_book(book, due)
  if book.is_matured then
    book.change, book.is_matured = M.next_change(book), false
  end
  book.due, book.seen, book.is_moved = min(due, book.due), book.now, true
end

-- Whether the sums stay exact when `more` is added to any of them, also what is spent and held together.
function M.is_exact(book, more)
  return max(book.granted, book.settled + book.held, book.expired, book.debt) + more <= CODE.MAX_AMOUNT
end

-- -- the book of one grant -----------------------------------------------------------------------------------

-- Most accounts have one grant, and most calls touch an account that no other call of the script does: such a row is
-- changed as a text, because a book costs several times as much as the change.

-- The row of an account that has no book yet, if this script has not changed it and it has grants; nothing where it takes
-- a book.
local function plain_row(key)
  if place_of[key] then
    return nil
  end
  local text = fetch(key)
  return text and #text > ACCOUNT_SIZE and text or nil
end
