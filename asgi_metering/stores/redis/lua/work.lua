-- What the calls of one script share beside their books: leases, indexes, events, and that all is written at the end.

-- Why an operation was not run here: the rules have to; it has to begin a script of its own.
CODE.RULES, CODE.LATER = 'S', 'N'

function M.push(list, one, other)
  local n = #list
  list[n + 1], list[n + 2] = one, other
end

function M.append(lists, key, one, other)
  local list = lists[key]
  if list then
    M.push(list, one, other)
  else
    lists[key] = { one, other }
  end
end

-- A hold of the account lives until `expires`.
function M.lives(account, expires, member)
  M.append(work.live, account, M.flt(expires), member)
  local known = work.due[account]
  if not known or expires < known then
    work.due[account] = expires
  end
end

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

-- What follows the letter of a key.
function M.rest(key)
  return sub(key, #work.prefix + 3)
end

-- -- writing ------------------------------------------------------------------------------------------------

function M.write_rows()
  for account, book in pairs(work.books) do
    if book.is_moved or book.is_due_new then
      M.put(work.prefix .. 'a:' .. account, M.book_text(book))
      for _, grant in ipairs(book.list) do
        if not M.is_open(grant) then
          call('HSET', work.prefix .. 'G:' .. account, grant.id, M.grant_text(grant))
        end
      end
      if book.is_new then
        call('ZADD', work.prefix .. 'z:accounts', 0, account)
      end
    end
  end
  local sets = {}
  for key in pairs(work.changed) do
    M.push(sets, key, work.rows[key])
  end
  if #sets > 0 then
    call('MSET', unpack(sets))
  end
  for i = 1, #work.fading, 2 do
    call('PEXPIRE', work.fading[i], work.fading[i + 1])
  end
  for key, index in pairs(work.gone) do
    call('DEL', key)
    call('ZREM', work.prefix .. 'z:' .. index, key)
  end
end

function M.write_lines()
  for account, lines in pairs(work.lines) do
    if call('RPUSH', work.prefix .. 'e:' .. account, unpack(lines)) == #lines then
      local _, _, _, _, at = parse(AS.ENTRY, lines[1])
      call('ZADD', work.prefix .. 'z:lines', M.flt(at), account)
    end
  end
  for account, index in pairs(work.refs) do
    call('ZADD', work.prefix .. 'r:' .. account, unpack(index))
  end
end

function M.write_lives()
  for account, members in pairs(work.live) do
    call('ZADD', work.prefix .. 'l:' .. account, unpack(members))
  end
  for account, members in pairs(work.ended_live) do
    call('ZREM', work.prefix .. 'l:' .. account, unpack(members))
  end
  local first = {}
  for account, at in pairs(work.due) do
    M.push(first, M.flt(at), account)
  end
  if #first > 0 then
    call('ZADD', work.prefix .. 'z:due', 'LT', unpack(first))
  end
  for pool, members in pairs(work.pools) do
    for member, change in pairs(members) do
      if change.after then
        call('ZADD', pool, M.flt(change.after), member)
        call('ZADD', work.prefix .. 'z:pools', 'LT', M.flt(change.after), pool)
      else
        call('ZREM', pool, member)
      end
    end
  end
end

function M.write_indexes()
  for account, members in pairs(work.windows_of) do
    call('SADD', work.prefix .. 'v:' .. account, unpack(members))
  end
  for name, index in pairs({
    ended = work.ended, counters = work.past_counters, windows = work.past_windows, charge = work.past_charge_keys,
    idempotency = work.past_idempotency,
  }) do
    if #index > 0 then
      call('ZADD', work.prefix .. 'z:' .. name, unpack(index))
    end
  end
end

function M.write_events()
  local ids = work.event_ids
  if #ids == 0 then
    return
  end
  local known, new = call('HMGET', work.prefix .. 'events', unpack(ids)), {}
  for i, id in ipairs(ids) do
    if not known[i] then
      new[#new + 1] = id
    elseif call('ZSCORE', work.prefix .. 'z:delivered', id) then
      -- What was delivered stays as it is.
      work.events[2 * i] = known[i]
    end
  end
  call('HSET', work.prefix .. 'events', unpack(work.events))
  if #new > 0 then
    call('RPUSH', work.prefix .. 'events:order', unpack(new))
  end
end

function M.flush()
  M.write_rows()
  M.write_lines()
  M.write_lives()
  M.write_indexes()
  M.write_events()
end
