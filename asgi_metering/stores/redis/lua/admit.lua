-- May this call run? Mirrors rules/admission.py: everything is decided in one step, all or nothing.
-- KEYS: gate, halt, hold, account, counters, idempotency key, charge keys, then what the sources name.
-- ARGV: time, token, numbers (10), what the call brings (5), charge key, idempotency key, and of each limit 6 words, of
-- each pool 2, of each source 10.
-- Answers {'A', now, held, available, source, who, counters as they were} if the call may run; {'R', now, live leases
-- of each pool, all rows, further rows with their keys} if not: why, the rules say from these rows.

local token = ARGV[2]
local row = call('MGET', unpack(KEYS))
local stop = stopped(row[1], row[2], token)
if stop then
  return stop
end
if row[3] then
  -- The same id again: the reply was lost, not the decision.
  return punt(token)
end

local amount, minimum, ttl, grace = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local n_limits, n_pools, n_sources = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local idempotency_at, charge_at, base = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local policy, unit, line, facts, own_who = ARGV[13], ARGV[14], ARGV[15], ARGV[16], ARGV[17]
local charge, idempotency = ARGV[18], ARGV[19]
local limits_at = 19
local pools_at = limits_at + 6 * n_limits
local sources_at = pools_at + 2 * n_pools
local now, now_text = clock(ARGV[1])

-- Sources: kind, whether it begins a payer object, split, limit or overdraft, where its account and its own first key
-- are, who pays, its name, and of a window its length or its boundaries, and how its keys begin.
local sources, accounts = {}, { 4 }
for i = 1, n_sources do
  local at = sources_at + 10 * i - 10
  local account = base + tonumber(ARGV[at + 5])
  sources[i] = {
    kind = ARGV[at + 1], first = ARGV[at + 2] == '1', split = ARGV[at + 3] == '1', limit = tonumber(ARGV[at + 4]),
    account = account, own = base + tonumber(ARGV[at + 6]), who = ARGV[at + 7], name = ARGV[at + 8],
    span = ARGV[at + 9], start = ARGV[at + 10], index = i,
  }
  if KEYS[account] ~= KEYS[accounts[#accounts]] then
    accounts[#accounts + 1] = account
  end
end

-- The latest time that any of the accounts has seen, and what of their calls is overdue by then.
local sums = {}
for _, at in ipairs(accounts) do
  if row[at] and not sums[KEYS[at]] then
    local told = { match(row[at], SUMS) }
    sums[KEYS[at]] = told
    local seen = tonumber(told[9])
    if seen > now then
      now, now_text = seen, json_time(seen)
    end
  end
end
for _, at in ipairs(accounts) do
  local told = sums[KEYS[at]]
  if told and tonumber(told[8]) <= now then
    local live = prefix .. 'l:' .. sub(KEYS[at], #prefix + 3)
    local first = call('ZRANGE', live, 0, 0, 'WITHSCORES')
    if first[2] and tonumber(first[2]) <= now then
      return punt(token)
    end
    told[8] = first[2] or 'inf'
    local rest = told[10]
    told[10] = nil
    call('SET', KEYS[at], concat(told, '\t') .. rest)
    told[10] = rest
  end
end

local counts, further = {}, {}

local function refused()
  local all = {}
  for i = 1, #KEYS do
    all[i] = row[i]
  end
  return { 'R', now_text, counts, all, further }
end

if idempotency ~= '' and row[idempotency_at] then
  local expires, receipt = match(row[idempotency_at], '^(%S+)\t[^\n]*\n([^\n]*)')
  if receipt == '' or tonumber(expires) > now then
    return refused()
  end
end

-- Rate limits: what they would be after this call.
local counters, pinned, past = {}, {}, {}
local is_stale, is_spent = false, false
for i = 1, n_limits do
  local at = limits_at + 6 * i - 6
  local kind, meter, bounds = ARGV[at + 1], ARGV[at + 5], ARGV[at + 6]
  local limit, window, cost = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  local text = row[4 + i]
  local t_start, t_end, t_used, t_previous, c_start, c_end, c_used, c_previous
  if text then
    t_start, t_end, t_used, t_previous = match(text, COUNTER)
    c_start, c_end, c_used = tonumber(t_start), tonumber(t_end), tonumber(t_used)
    c_previous = t_previous == '0' and 0 or tonumber(t_previous)
  end
  local start, finish, count, previous, used = now, now + window, 0, 0, nil
  if kind == 's' then
    local at = now
    if text and c_start > at then
      at = c_start
    end
    start = floor(at / window) * window
    finish = start + window
    if text then
      if c_start == start then
        count, previous = c_used, c_previous
      elseif c_start == start - window then
        previous = c_used
      end
    end
    used = floor(previous * (finish - at) / window) + count
  elseif kind == 'c' then
    local _, from, to = pick(words(bounds, ' '), now)
    if not from then
      is_stale = true
    else
      start, finish = from, to
      if text and c_start > now then
        start, finish, count = c_start, c_end, c_used
      elseif text and c_start == start then
        count = c_used
      end
    end
    used = count
  else
    if text and now < c_end then
      start, finish, count = c_start, c_end, c_used
    end
    used = count
  end
  if used + cost > limit then
    is_spent = true
  end
  if count + cost > MAX_AMOUNT then
    return punt(token)
  end
  local is_new = c_start ~= start or c_end ~= finish
  if is_new then
    t_start, t_end = flt(start), flt(finish)
  end
  if is_new or previous ~= c_previous then
    t_previous = int(previous)
  end
  counters[i] = t_start .. '\t' .. t_end .. '\t' .. int(count + cost) .. '\t' .. t_previous
  if is_new then
    past[#past + 1] = flt(finish + (finish - start))
    past[#past + 1] = KEYS[4 + i]
  end
  if meter ~= '' then
    pinned[#pinned + 1] = concat({ t_start, int(cost), meter, KEYS[4 + i] }, GLUE)
  end
end
if is_stale then
  return refused()
end

local is_full = false
for i = 1, n_pools do
  local live = call('ZCOUNT', ARGV[pools_at + 2 * i - 1], '(' .. now_text, '+inf')
  counts[i] = live
  if live >= tonumber(ARGV[pools_at + 2 * i]) then
    is_full = true
  end
end
if is_full or is_spent then
  return refused()
end

-- Sources: the first payer object that can pay takes the whole call.
local function window_of(source)
  local start, finish, key, text
  if source.kind == 'c' then
    local index
    index, start, finish = pick(words(source.span, ' '), now)
    if not index then
      return nil
    end
    key, text = KEYS[source.own + index], row[source.own + index]
  else
    local latest = row[source.own]
    if latest then
      key = source.start .. latest
      text = call('GET', key)
      further[#further + 1] = key
      further[#further + 1] = text
      start, finish = match(text, '^(%S+)\t(%S+)')
      start, finish = tonumber(start), tonumber(finish)
    end
    if not latest or now > finish then
      start, finish = now, now + tonumber(source.span)
      key, text = source.start .. flt(start), false
    end
  end
  local window = { key = key, start = start, finish = finish, settled = 0, held = 0, is_new = not text }
  if text then
    local _, _, settled, held = match(text, COUNTER)
    window.settled, window.held = tonumber(settled), tonumber(held)
  end
  return window
end

-- What the source could give; nil where its calendar does not cover now.
local function offer_of(source, book)
  local window
  local can
  if source.kind == 'w' then
    can = available(book) + source.limit
  else
    window = window_of(source)
    if not window then
      return nil
    end
    can = source.limit - window.settled - window.held
  end
  return { source = source, can = can, fits = math.min(amount, can) >= minimum, window = window }
end

-- Those of a split group's offers that give something, or the first one that owes nothing where nothing is taken.
local function together(offers)
  local giving, sum = {}, 0
  for _, offer in ipairs(offers) do
    if offer.can > 0 then
      giving[#giving + 1] = offer
      sum = sum + offer.can
    end
  end
  if amount > 0 and #giving > 0 and sum >= minimum then
    return giving
  end
  for _, offer in ipairs(offers) do
    if offer.fits then
      return { offer }
    end
  end
end

local function first_group()
  local i = 1
  while i <= n_sources do
    local book = open_book(KEYS[sources[i].account], sums[KEYS[sources[i].account]], now, now_text)
    local lines_before = #lines
    local offers, known, is_split = {}, {}, false
    repeat
      local source = sources[i]
      local offer = offer_of(source, book)
      if not offer then
        return nil
      end
      if offer.fits and not source.split then
        return book, { offer }
      end
      is_split = is_split or source.split
      -- A place that is named twice has no more for that.
      if not known[source.name] then
        known[source.name] = true
        offers[#offers + 1] = offer
      end
      i = i + 1
    until i > n_sources or sources[i].first
    local giving = is_split and together(offers)
    if giving then
      return book, giving
    end
    -- Nothing that this account would have written down is written.
    for at = #lines, lines_before + 1, -1 do
      lines[at] = nil
    end
  end
  return nil
end

local expires = now + ttl
local expires_text = flt(expires)
local due_text = flt(expires + grace)
local parts, windows = {}, {}
local held, left_there, last, who = 0, 0, 0, own_who
local book

local function take(offers)
  local left = amount
  for _, offer in ipairs(offers) do
    local some = math.min(left, offer.can)
    local window = offer.window
    if window then
      parts[#parts + 1] = { 'allowance', json_time(window.start), some, offer.source.name }
      window.held = window.held + some
      windows[#windows + 1] = window
    else
      book_hold(book, some, parts)
    end
    left = left - some
    last = offer.source.index
    left_there = window and offer.can - some
    if left == 0 then
      break
    end
  end
  if not left_there then
    left_there = available(book)
  end
  held = amount - left
  who = offers[1].source.who
end

local function hold_text(brought_unit, charge_key, its_idempotency, amount_held, its_parts, its_windows, its_pools, ends, falls_due)
  return 'held\t' .. ends .. '\t' .. falls_due .. '\t0\t' .. amount_held .. '\t' .. now_text .. '\t-\n'
    .. its_parts .. '\n' .. its_windows .. '\n' .. who .. '\n'
    .. policy .. '\t' .. brought_unit .. '\t' .. line .. '\t' .. charge_key .. '\t' .. its_idempotency .. '\n'
    .. its_pools .. '\n' .. facts .. '\n'
end

local member = sub(KEYS[3], #prefix + 3)
local idempotency_key = idempotency ~= '' and KEYS[idempotency_at] or ''
local pools = {}
for i = 1, n_pools do
  pools[i] = ARGV[pools_at + 2 * i - 1]
end
local pools_text, pinned_text = concat(pools, '\t'), concat(pinned, '\t')
local charge_key, joined, is_held = '', 0, true
local new_key, new_key_end

if n_sources == 0 and amount == 0 then
  is_held = n_pools > 0 or #pinned > 0 or idempotency ~= ''
elseif charge ~= '' then
  -- The first call of the key's window pays for all, the others join it free.
  local kind, span = match(charge, '^(%S)\t(.*)$')
  local start, finish, at = now, nil, charge_at
  if kind == 'c' then
    local index
    index, start, finish = pick(words(span, ' '), now)
    if not index then
      return refused()
    end
    at = charge_at + index - 1
  else
    finish = now + tonumber(span)
  end
  charge_key = KEYS[at]
  local known = row[at]
  if known then
    local k_start, k_end, k_members, k_settled, k_hold = match(known, '^(%S+)\t(%S+)\t(%S+)\t(%S)\t(.*)$')
    if kind == 'c' or now < tonumber(k_end) or (k_settled == '0' and k_members ~= '0') then
      local owned = call('GET', k_hold)
      if owned then
        local _, _, _, owned_who, own = match(owned, HOLD)
        who, unit = owned_who, match(own, '^[^\t]*\t[^\t]*\t[^\t]*\t([^\t]*)')
      end
      put(charge_key, concat({ k_start, k_end, int(tonumber(k_members) + 1), k_settled, k_hold }, '\t'))
      joined = 1
    end
  end
  if joined == 0 then
    local owned = KEYS[3] .. ':key'
    if call('EXISTS', owned) == 1 then
      -- An id that comes again long after: what it left behind has to go first.
      return punt(token)
    end
    local giving
    book, giving = first_group()
    if not book then
      return refused()
    end
    take(giving)
    put(owned, hold_text(unit, '', '', int(held), parts_text(parts), '', '', 'inf', 'inf'))
    put(charge_key, concat({ flt(start), flt(finish), '1', '0', owned }, '\t'))
    new_key, new_key_end = charge_key, finish
  end
else
  local giving
  book, giving = first_group()
  if not book then
    return refused()
  end
  take(giving)
end

if book then
  close_book(book, expires, expires_text)
  if not is_exact(book) then
    return punt(token)
  end
end
for _, window in ipairs(windows) do
  put(window.key, concat({ flt(window.start), flt(window.finish), int(window.settled), int(window.held) }, '\t'))
end
local answer = { 'A', now_text, int(held), int(left_there), last, who, joined }
for i = 1, n_limits do
  put(KEYS[4 + i], counters[i])
  answer[7 + i] = row[4 + i]
end
if idempotency ~= '' then
  local life, claim = match(idempotency, '^(%S+)(.*)$')
  put(idempotency_key, flt(now + tonumber(life)) .. claim .. '\n\n')
  call('ZADD', prefix .. 'z:idempotency', flt(now + tonumber(life)), idempotency_key)
end
if is_held then
  local whole = charge_key == ''
  put(KEYS[3], hold_text(
    unit, charge_key, idempotency_key, whole and int(held) or '0', whole and parts_text(parts) or '', pinned_text, pools_text,
    expires_text, due_text
  ))
end

-- From here on everything is written.
flush()
if book then
  note_account(book)
end
if #past > 0 then
  call('ZADD', prefix .. 'z:counters', unpack(past))
end
for _, window in ipairs(windows) do
  if window.is_new then
    local rest = sub(window.key, #prefix + 3)
    local bucket, start = match(rest, '^(.*)\31([^\31]*)$')
    local account, name = match(bucket, '^(.*\31.*)\31([^\31]*)$')
    call('ZADD', prefix .. 'z:windows', flt(window.finish), window.key)
    call('SADD', prefix .. 'v:' .. account, name .. GLUE .. start)
    local latest = call('GET', prefix .. 'W:' .. bucket)
    if not latest or window.start >= tonumber(latest) then
      call('SET', prefix .. 'W:' .. bucket, start)
    end
  end
end
if new_key then
  call('ZADD', prefix .. 'z:charge', flt(new_key_end), new_key)
end
if is_held then
  local at = expires_text
  local account = sub(match(who, '^[^\t]*'), #prefix + 3)
  if new_key then
    call('ZADD', prefix .. 'l:' .. account, at, member, 'inf', member .. ':key')
  else
    call('ZADD', prefix .. 'l:' .. account, at, member)
  end
  call('ZADD', prefix .. 'z:due', 'LT', at, account)
  for i = 1, n_pools do
    call('ZADD', pools[i], at, member)
    call('ZADD', prefix .. 'z:pools', 'LT', at, pools[i])
  end
end
return answer
