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

-- A hold of the account lives until `expires`: mostly as long as the one before.
local last_expires, last_score
local function lives(account, expires, member)
  if expires ~= last_expires then
    last_expires, last_score = expires, string.format('%.17g', expires)
  end
  local members = live[account]
  if not members then
    live[account] = { expires, last_score, member }
    return
  end
  push(members, last_score, member)
  members[1] = min(expires, members[1])
end
M.lives = lives

-- Leases change at the end, and count at once.
function M.lease(pool, member, expires)
  local pools = rare_of('pools')
  local own = pools[pool] or {}
  pools[pool] = own
  if own[member] == nil then
    own[member] = { before = tonumber(call('ZSCORE', pool, member) or nil) }
  end
  own[member].after = expires
end

function M.live_leases(pool, now)
  local count = call('ZCOUNT', pool, '(' .. M.flt(now), '+inf')
  for _, change in pairs(rare_of('pools')[pool] or {}) do
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

-- Scores are numbers, which a command gets with all their digits, or texts with all of them where the same one comes
-- often. What was written is forgotten, so that nothing of it is found by the next script.

-- Whatever was changed goes into one list, and is set at once.
local function write_books(sets, n)
  for account, book in next, books do
    if book.is_moved or book.is_due_new then
      local text, closed = M.book_text(book)
      sets[n + 1], sets[n + 2] = book.key, text
      n = n + 2
      if closed then
        call('HSET', work.prefix .. 'G:' .. account, unpack(closed))
      end
      if book.text == '' then
        call('ZADD', work.prefix .. 'z:accounts', 0, account)
      end
    end
  end
  return n
end

local function write_rows()
  local sets = {}
  local n = write_books(sets, 0)
  for key in next, changed do
    sets[n + 1], sets[n + 2] = key, rows[key]
    n = n + 2
  end
  if n > 0 then
    call('MSET', unpack(sets, 1, n))
  end
  local fading, gone = work.fading, work.gone
  if #fading > 0 then
    for i = 1, #fading, 2 do
      call('PEXPIRE', fading[i], fading[i + 1])
    end
    work.fading = {}
  end
  if is_gone then
    for key, index in next, gone do
      call('DEL', key)
      call('ZREM', work.prefix .. 'z:' .. index, key)
    end
    work.gone, is_gone = {}, false
  end
end

local function write_lines()
  if not next(lines) then
    return
  end
  local prefix = work.prefix
  for account, some in next, lines do
    if call('RPUSH', prefix .. 'e:' .. account, unpack(some)) == #some then
      local _, _, _, _, at = parse(AS.ENTRY, some[1])
      call('ZADD', prefix .. 'z:lines', at, account)
    end
  end
  lines = {}
end

local function write_lives()
  local prefix, first, n = work.prefix, {}, 0
  for account, members in next, live do
    call('ZADD', prefix .. 'l:' .. account, unpack(members, 2))
    first[n + 1], first[n + 2] = M.flt(members[1]), account
    n = n + 2
  end
  if n > 0 then
    call('ZADD', prefix .. 'z:due', 'LT', unpack(first, 1, n))
    live = {}
  end
end

local function write_ends()
  local ended_live = work.ended_live
  if next(ended_live) then
    local prefix = work.prefix
    for account, members in next, ended_live do
      call('ZREM', prefix .. 'l:' .. account, unpack(members))
    end
    work.ended_live = {}
  end
  if #ended > 0 then
    call('ZADD', work.prefix .. 'z:ended', unpack(ended))
    ended = {}
  end
end

local function write_events()
  local ids = work.event_ids
  local n = #ids
  if n == 0 then
    return
  end
  local prefix = work.prefix
  local known, new = call('HMGET', prefix .. 'events', unpack(ids)), {}
  for i = 1, n do
    if not known[i] then
      new[#new + 1] = ids[i]
    elseif call('ZSCORE', prefix .. 'z:delivered', ids[i]) then
      -- What was delivered stays as it is.
      work.events[2 * i] = known[i]
    end
  end
  call('HSET', prefix .. 'events', unpack(work.events))
  if #new > 0 then
    call('RPUSH', prefix .. 'events:order', unpack(new))
  end
  work.events, work.event_ids = {}, {}
end

local function write_leases(pools)
  local first = work.prefix .. 'z:pools'
  for pool, members in next, pools do
    for member, change in next, members do
      if change.after then
        call('ZADD', pool, change.after, member)
        call('ZADD', first, 'LT', change.after, pool)
      else
        call('ZREM', pool, member)
      end
    end
  end
end

local NONE = {}

local function write_rare(rare)
  local prefix = work.prefix
  for account, index in next, rare.refs or NONE do
    call('ZADD', prefix .. 'r:' .. account, unpack(index))
  end
  for account, members in next, rare.windows or NONE do
    call('SADD', prefix .. 'v:' .. account, unpack(members))
  end
  for name, index in next, rare.past or NONE do
    call('ZADD', prefix .. 'z:' .. name, unpack(index))
  end
  write_leases(rare.pools or NONE)
end

function M.flush()
  write_rows()
  write_lines()
  write_lives()
  write_ends()
  write_events()
  if work.rare then
    write_rare(work.rare)
  end
  nothing_left()
end
