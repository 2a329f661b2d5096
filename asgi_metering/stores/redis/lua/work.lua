-- What the calls of one script share beside their books: leases, indexes, events, and that all is written at the end.

-- Why an operation was not run here: the rules have to; it has to begin a script of its own.
CODE.RULES, CODE.LATER = 'S', 'N'

local function push(list, one, other)
  local n = #list
  list[n + 1], list[n + 2] = one, other
end
M.push = push

local function append(lists, key, one, other)
  local list = lists[key]
  if list then
    push(list, one, other)
  else
    lists[key] = { one, other }
  end
end
M.append = append

-- A hold of the account lives until `expires`.
local function lives(account, expires, member)
  append(work.live, account, expires, member)
  local due = work.due
  local known = due[account]
  if not known or expires < known then
    due[account] = expires
  end
end
M.lives = lives

-- Leases change at the end, and count at once.
function M.lease(pool, member, expires)
  local own = work.pools[pool]
  if not own then
    own = {}
    work.pools[pool] = own
  end
  if own[member] == nil then
    own[member] = { before = tonumber(call('ZSCORE', pool, member) or nil) }
  end
  own[member].after = expires
end

function M.live_leases(pool, now)
  local count = call('ZCOUNT', pool, '(' .. M.flt(now), '+inf')
  for _, change in pairs(work.pools[pool] or {}) do
    if change.before and change.before > now then
      count = count - 1
    end
    if change.after and change.after > now then
      count = count + 1
    end
  end
  return count
end

function M.texts_of(text)
  local list, at = {}, 1
  while at <= #text do
    list[#list + 1], at = parse('>I4c0', text, at)
  end
  return list
end

-- The window of `bounds` that holds `now`, as index, start, end; nothing outside of them all.
function M.pick(bounds, now)
  local index = 0
  for i = 1, #bounds do
    if bounds[i] > now then
      break
    end
    index = i
  end
  if index > 0 and index < #bounds then
    return index, bounds[index], bounds[index + 1]
  end
end

function M.doubles_of(text)
  local list, at = {}, 1
  while at <= #text do
    list[#list + 1], at = parse('>d', text, at)
  end
  return list
end

-- -- writing ------------------------------------------------------------------------------------------------

-- Scores are numbers: a command gets them with all their digits. What was written is forgotten, so that nothing of it is
-- found by the next script.

local function write_books()
  for account, book in next, books do
    if book.is_moved or book.is_due_new then
      put(book.key, M.book_text(book))
      for i = 1, #book do
        if not M.is_open(book[i]) then
          call('HSET', work.prefix .. 'G:' .. account, book[i].id, M.grant_text(book[i]))
        end
      end
      if book.text == '' then
        call('ZADD', work.prefix .. 'z:accounts', 0, account)
      end
    end
  end
end

local function write_rows()
  local sets, n = {}, 0
  for key in next, changed do
    sets[n + 1], sets[n + 2] = key, rows[key]
    n = n + 2
  end
  if n > 0 then
    call('MSET', unpack(sets, 1, n))
  end
  for i = 1, #work.fading, 2 do
    call('PEXPIRE', work.fading[i], work.fading[i + 1])
  end
  for key, index in next, work.gone do
    call('DEL', key)
    call('ZREM', work.prefix .. 'z:' .. index, key)
  end
end

local function write_lines()
  local prefix = work.prefix
  for account, lines in next, work.lines do
    if call('RPUSH', prefix .. 'e:' .. account, unpack(lines)) == #lines then
      local _, _, _, _, at = parse(AS.ENTRY, lines[1])
      call('ZADD', prefix .. 'z:lines', at, account)
    end
  end
  for account, index in next, work.refs do
    call('ZADD', prefix .. 'r:' .. account, unpack(index))
  end
end

local function write_lives()
  local prefix = work.prefix
  for account, members in next, work.live do
    call('ZADD', prefix .. 'l:' .. account, unpack(members))
  end
  for account, members in next, work.ended_live do
    call('ZREM', prefix .. 'l:' .. account, unpack(members))
  end
  local first, n = {}, 0
  for account, at in next, work.due do
    first[n + 1], first[n + 2] = at, account
    n = n + 2
  end
  if n > 0 then
    call('ZADD', prefix .. 'z:due', 'LT', unpack(first, 1, n))
  end
end

local function write_leases()
  local due = work.prefix .. 'z:pools'
  for pool, members in next, work.pools do
    for member, change in next, members do
      if change.after then
        call('ZADD', pool, change.after, member)
        call('ZADD', due, 'LT', change.after, pool)
      else
        call('ZREM', pool, member)
      end
    end
  end
end

-- Field of `work`, and the index that it comes into.
local INDEXES = {
  ended = 'ended', past_counters = 'counters', past_windows = 'windows', past_charge_keys = 'charge',
  past_idempotency = 'idempotency',
}

local function write_indexes()
  local prefix = work.prefix
  for account, members in next, work.windows_of do
    call('SADD', prefix .. 'v:' .. account, unpack(members))
  end
  for field, name in next, INDEXES do
    local index = work[field]
    if #index > 0 then
      call('ZADD', prefix .. 'z:' .. name, unpack(index))
      work[field] = {}
    end
  end
end

local function write_events()
  local ids = work.event_ids
  local n, events, order = #ids, work.prefix .. 'events', work.prefix .. 'events:order'
  if n == 0 then
    return
  end
  local new = ids
  if call('HSET', events, unpack(work.events)) < n then
    -- Some were known: those have their place.
    new = {}
    for i = 1, n do
      if not call('LPOS', order, ids[i]) then
        new[#new + 1] = ids[i]
      end
    end
  end
  if #new > 0 then
    call('RPUSH', order, unpack(new))
  end
  work.events, work.event_ids = {}, {}
end

function M.flush()
  write_books()
  write_rows()
  write_lines()
  write_lives()
  write_leases()
  write_indexes()
  write_events()
  nothing_left()
end
