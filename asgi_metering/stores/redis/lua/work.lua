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
  local place = live[account]
  if not place then
    place = n_lived
    live[account], n_lived = place, place + 4
    lived[place + 1], lived[place + 2], lived[place + 3], lived[place + 4] = account, expires, last_score, member
    return
  end
  local all = more_live[account]
  if not all then
    all = { lived[place + 3], lived[place + 4] }
    more_live[account] = all
  end
  push(all, last_score, member)
  lived[place + 2] = min(expires, lived[place + 2])
end
M.lives = lives

-- It lives no more.
local function lives_no_more(account, member)
  local place = ended_live[account]
  if not place then
    ended_live[account], left[n_left + 1], left[n_left + 2] = n_left, account, member
    n_left = n_left + 2
    return
  end
  local all = more_left[account]
  if not all then
    all = { left[place + 2] }
    more_left[account] = all
  end
  all[#all + 1] = member
end
M.lives_no_more = lives_no_more

local function has_ended(member, now)
  ended[n_ended + 1], ended[n_ended + 2] = M.flt(now), member
  n_ended = n_ended + 2
end

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

-- What one command takes of a list: Lua has no room for twice as much. Few scripts have more, and what fails when
-- something was written is not taken back.
local MANY = 4000

local function in_pieces(command, key, list, n)
  for i = 1, n, MANY do
    local to = min(i + MANY - 1, n)
    if key then
      call(command, key, unpack(list, i, to))
    else
      call(command, unpack(list, i, to))
    end
  end
end

-- Whatever was changed goes into one list, and is set at once.
local function write_books()
  for account, book in next, books do
    if book.is_moved or book.is_due_new then
      local text, closed = M.book_text(book)
      put(book.key, text)
      if closed then
        call('HSET', prefix .. 'G:' .. account, unpack(closed))
      end
      if book.text == '' then
        call('ZADD', prefix .. 'z:accounts', 0, account)
      end
    end
  end
end

local function write_rows()
  write_books()
  if n_sets > MANY then
    in_pieces('MSET', nil, sets, n_sets)
  elseif n_sets > 0 then
    call('MSET', unpack(sets, 1, n_sets))
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
      call('ZREM', prefix .. 'z:' .. index, key)
    end
    work.gone, is_gone = {}, false
  end
end

local function write_lines()
  local is_any = false
  for account, line in next, lines do
    is_any = true
    local all, n = more_lines[account], 1
    local key = prefix .. 'e:' .. account
    if all then
      n = #all
      n = call('RPUSH', key, unpack(all)) - n
    else
      n = call('RPUSH', key, line) - n
    end
    if n == 0 then
      local _, _, _, _, at = parse(AS.ENTRY, line)
      call('ZADD', prefix .. 'z:lines', at, account)
    end
  end
  if is_any then
    lines, more_lines = {}, {}
  end
end

local first_due = {}

local function write_lives()
  if n_lived == 0 then
    return
  end
  local n = 0
  for i = 1, n_lived, 4 do
    local account, score = lived[i], lived[i + 2]
    local all = more_live[account]
    if all then
      call('ZADD', prefix .. 'l:' .. account, unpack(all))
      score = M.flt(lived[i + 1])
    else
      call('ZADD', prefix .. 'l:' .. account, score, lived[i + 3])
    end
    first_due[n + 1], first_due[n + 2] = score, account
    n = n + 2
  end
  call('ZADD', prefix .. 'z:due', 'LT', unpack(first_due, 1, n))
  n_lived, live, more_live = 0, {}, {}
end

local function write_ends()
  for i = 1, n_left, 2 do
    local account = left[i]
    local all = more_left[account]
    if all then
      call('ZREM', prefix .. 'l:' .. account, unpack(all))
    else
      call('ZREM', prefix .. 'l:' .. account, left[i + 1])
    end
  end
  if n_left > 0 then
    n_left, ended_live, more_left = 0, {}, {}
  end
  if n_ended > 0 then
    call('ZADD', prefix .. 'z:ended', unpack(ended, 1, n_ended))
    n_ended = 0
  end
end

local function write_events()
  local n = n_events
  if n == 0 then
    return
  end
  local known, new, n_new = call('HMGET', prefix .. 'events', unpack(event_ids, 1, n)), event_ids, n
  for i = 1, n do
    if known[i] and new == event_ids then
      new, n_new = { unpack(event_ids, 1, i - 1) }, i - 1
    end
    if known[i] and call('ZSCORE', prefix .. 'z:delivered', event_ids[i]) then
      -- What was delivered stays as it is.
      events[2 * i] = known[i]
    elseif not known[i] and new ~= event_ids then
      n_new = n_new + 1
      new[n_new] = event_ids[i]
    end
  end
  call('HSET', prefix .. 'events', unpack(events, 1, 2 * n))
  if n_new > 0 then
    call('RPUSH', prefix .. 'events:order', unpack(new, 1, n_new))
  end
  n_events = 0
end

local function write_leases(pools)
  local first = prefix .. 'z:pools'
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
  for account, index in next, rare.refs or NONE do
    call('ZADD', prefix .. 'r:' .. account, unpack(index))
  end
  for account, members in next, rare.windows or NONE do
    call('SADD', prefix .. 'v:' .. account, unpack(members))
  end
  for name, index in next, rare.past or NONE do
    in_pieces('ZADD', prefix .. 'z:' .. name, index, #index)
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
