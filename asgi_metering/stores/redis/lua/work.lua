-- What the calls of one script share beside their books: leases, indexes, events, and that all is written at the end.

-- The time of this script.
local now_is

-- Why an operation was not run here: the rules have to; it has to begin a script of its own.
local RULES, LATER = 'S', 'N'

-- By account or pool or kind: what goes into sorted sets, and out of them.
local live, ended_live, pools = {}, {}, {}
local due, ended, past_counters, past_windows, past_charge_keys, past_idempotency = {}, {}, {}, {}, {}, {}
local windows_of, events, event_ids = {}, {}, {}

local function push(list, one, other)
  local n = #list
  list[n + 1], list[n + 2] = one, other
end

local function append(lists, key, one, other)
  local list = lists[key]
  if list then
    push(list, one, other)
  else
    lists[key] = { one, other }
  end
end

-- A hold of the account lives until `expires`.
local function lives(account, expires, member)
  append(live, account, flt(expires), member)
  local known = due[account]
  if not known or expires < known then
    due[account] = expires
  end
end

-- Leases change at the end, and count at once.
local function lease(pool, member, expires)
  local own = pools[pool]
  if not own then
    own = {}
    pools[pool] = own
  end
  if own[member] == nil then
    own[member] = { before = tonumber(call('ZSCORE', pool, member) or nil) }
  end
  own[member].after = expires
end

local function live_leases(pool, now)
  local count = call('ZCOUNT', pool, '(' .. flt(now), '+inf')
  for _, change in pairs(pools[pool] or {}) do
    if change.before and change.before > now then
      count = count - 1
    end
    if change.after and change.after > now then
      count = count + 1
    end
  end
  return count
end

local function texts_of(text)
  local list, at = {}, 1
  while at <= #text do
    list[#list + 1], at = parse('>I4c0', text, at)
  end
  return list
end

-- The window of `bounds` that holds `now`, as index, start, end; nothing outside of them all.
local function pick(bounds, now)
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

local function doubles_of(text)
  local list, at = {}, 1
  while at <= #text do
    list[#list + 1], at = parse('>d', text, at)
  end
  return list
end

local function flush()
  local sets = {}
  for account, book in pairs(books) do
    if book.is_moved or book.is_due_new then
      put(prefix .. 'a:' .. account, book_text(book))
      for _, grant in ipairs(book.list) do
        if not is_open(grant) then
          call('HSET', prefix .. 'G:' .. account, grant.id, grant_text(grant))
        end
      end
      if book.is_new then
        call('ZADD', prefix .. 'z:accounts', 0, account)
      end
    end
  end
  for key in pairs(changed) do
    push(sets, key, rows[key])
  end
  if #sets > 0 then
    call('MSET', unpack(sets))
  end
  for account, own in pairs(lines) do
    if call('RPUSH', prefix .. 'e:' .. account, unpack(own)) == #own then
      local _, _, _, _, at = parse(ENTRY, own[1])
      call('ZADD', prefix .. 'z:lines', flt(at), account)
    end
  end
  for account, index in pairs(refs) do
    call('ZADD', prefix .. 'r:' .. account, unpack(index))
  end
  for account, pairs_of in pairs(live) do
    call('ZADD', prefix .. 'l:' .. account, unpack(pairs_of))
  end
  for account, members in pairs(ended_live) do
    call('ZREM', prefix .. 'l:' .. account, unpack(members))
  end
  local first = {}
  for account, at in pairs(due) do
    push(first, flt(at), account)
  end
  if #first > 0 then
    call('ZADD', prefix .. 'z:due', 'LT', unpack(first))
  end
  for pool, members in pairs(pools) do
    for member, change in pairs(members) do
      if change.after then
        call('ZADD', pool, flt(change.after), member)
        call('ZADD', prefix .. 'z:pools', 'LT', flt(change.after), pool)
      else
        call('ZREM', pool, member)
      end
    end
  end
  for account, members in pairs(windows_of) do
    call('SADD', prefix .. 'v:' .. account, unpack(members))
  end
  for name, index in pairs({
    ended = ended, counters = past_counters, windows = past_windows, charge = past_charge_keys,
    idempotency = past_idempotency,
  }) do
    if #index > 0 then
      call('ZADD', prefix .. 'z:' .. name, unpack(index))
    end
  end
  for key, index in pairs(gone) do
    call('DEL', key)
    call('ZREM', prefix .. 'z:' .. index, key)
  end
  if #event_ids > 0 then
    local known, new = call('HMGET', prefix .. 'events', unpack(event_ids)), {}
    for i, id in ipairs(event_ids) do
      if not known[i] then
        new[#new + 1] = id
      end
    end
    call('HSET', prefix .. 'events', unpack(events))
    if #new > 0 then
      call('RPUSH', prefix .. 'events:order', unpack(new))
    end
  end
end
