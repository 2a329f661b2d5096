-- Rate limits: what each would count after a call. Mirrors look in rules/windows.py.

CODE.FIXED, CODE.CALENDAR, CODE.SLIDING, CODE.MOVING, CODE.BUCKET = 0, 1, 2, 3, 4
-- Behind a counter, where what a log and a bucket keep beside begins.
CODE.LOG, CODE.FILLED, CODE.BEHIND = 'm', 'b', 33
-- Where what a bucket was before it was full begins.
CODE.PRIOR = CODE.BEHIND + 1 + 3 * 8

-- Before the meters of what a part counts: see stores/redis/parts.py.
CODE.COUNTED, CODE.BEGUN = '#', '+'

-- Limits and sources come again and again: each is read once, and remembered up to a bound.
local REMEMBERED = 1000
local known = { count = 0, limits = {}, sources = {} }

local function remember(kind, text, told)
  if known.count == REMEMBERED then
    known.count, known.limits, known.sources = 0, {}, {}
  end
  known.count = known.count + 1
  known[kind][text] = told
  return told
end

local function limits_of(text)
  local limits = known.limits[text]
  if limits then
    return limits
  end
  limits = {}
  local at = 1
  while at <= #text do
    local limit, bounds = {}, nil
    limit.kind, limit.limit, limit.window, limit.cost, limit.meter, bounds, at = parse('>BdddI4c0I4c0', text, at)
    limit.bounds, limit.is_fixed = M.doubles_of(bounds), limit.kind == CODE.FIXED
    limits[#limits + 1] = limit
  end
  return remember('limits', text, limits)
end

-- What one limit's counter would be after this call: its row, start, end, used before; nothing outside its calendar.
function M.counted(limit, text, now)
  local window = limit.window
  local start, finish, count, previous, used = now, now + window, 0, 0, nil
  local c_start, c_end, c_used, c_previous
  if text then
    c_start, c_end, c_used, c_previous = parse(AS.WINDOW, text)
  end
  if limit.kind == CODE.FIXED then
    if text and now < c_end then
      start, finish, count = c_start, c_end, c_used
    end
    used = count
  elseif limit.kind == CODE.CALENDAR then
    local _, from, to = M.pick(limit.bounds, now)
    if not from then
      return nil
    end
    start, finish = from, to
    if text and c_start > now then
      start, finish, count = c_start, c_end, c_used
    elseif text and c_start == start then
      count = c_used
    end
    used = count
  else
    local at = now
    if text and c_start > at then
      at = c_start
    end
    start = floor(at / window) * window
    finish = start + window
    if text and c_start == start then
      count, previous = c_used, c_previous
    elseif text and c_start == start - window then
      previous = c_used
    end
    used = floor(previous * (finish - at) / window) + count
  end
  local is_new = c_start ~= start or c_end ~= finish
  return pack(AS.WINDOW, start, finish, count + limit.cost, previous), start, finish, used, count, is_new
end

-- The place in a row of the first call of its log that came at `time` or later; behind the row, if none did.
function M.first_from(row, time)
  local low, high = 0, floor((#row - CODE.BEHIND) / 8)
  while low < high do
    local middle = floor((low + high) / 2)
    if parse('>d', row, CODE.BEHIND + 1 + 8 * middle) < time then
      low = middle + 1
    else
      high = middle
    end
  end
  return CODE.BEHIND + 1 + 8 * low
end

-- What a moving log would be after this call. Mirrors _look_moving in rules/windows.py. Returns its row, what the answer
-- tells of it, when the call came, when that is past, and how many came before.
function M.logged(limit, text, now)
  local window, cost, at, log, count = limit.window, limit.cost, now, '', 0
  if text then
    local newest = parse('>d', text)
    if newest > at then
      at = newest
    end
    if sub(text, CODE.BEHIND, CODE.BEHIND) == CODE.LOG then
      log = sub(text, M.first_from(text, at - window))
      count = #log / 8
    end
  end
  local leaves = (count > 0 and parse('>d', log) or at) + window
  local finish, after = at + window, count + cost
  local told, row = pack(AS.WINDOW, at, leaves, after, 0), nil
  if cost == 0 and count > 0 then
    -- Whoever only looks changes nothing.
    at, finish = parse('>dd', text)
    row = after <= limit.limit and text or nil
  elseif after <= limit.limit then
    row = pack(AS.WINDOW, at, finish, after, 0) .. CODE.LOG .. log .. string.rep(pack('>d', at), cost)
  end
  return row, told, at, finish + (finish - at), count
end

-- When `amount` has flowed into a bucket that was full at `start`. Mirrors due in rules/buckets.py.
local function due(limit, start, amount)
  return start + amount * limit.window / limit.bounds[1]
end

-- What a bucket would be after this call. Mirrors filling in rules/buckets.py and in_bucket in rules/windows.py. Returns
-- its row, what the answer tells of it, since when it is not full, when that is past, what was taken since, whether it
-- fits, and whether nothing went before.
function M.filled(limit, text, now)
  local start, taken, at, prior, previous, is_new = now, 0, now, '', 0, true
  local c_start, c_end, c_taken, c_previous
  if text and sub(text, CODE.BEHIND, CODE.BEHIND) == CODE.FILLED then
    c_start, c_end, c_taken, c_previous = parse(AS.WINDOW, text)
    local seen = parse('>d', text, CODE.BEHIND + 1)
    if seen > at then
      at = seen
    end
    start, is_new = at, at >= c_end
    if at < due(limit, c_start, c_taken) then
      start, taken, prior, previous = c_start, c_taken, sub(text, CODE.PRIOR), c_previous
    elseif not is_new then
      prior, previous = pack('>d', c_start), c_taken
    end
  end
  local refill, window = limit.bounds[1], limit.window
  local after, pace, fill = taken + limit.cost, window / refill, limit.limit * window / refill
  local finish = start + after * pace + fill
  local row = pack(AS.WINDOW, start, finish, after, previous) .. CODE.FILLED .. pack('>ddd', at, pace, fill) .. prior
  local told = pack(AS.WINDOW, start, at, after, 0)
  local fits = due(limit, start, after - limit.limit) <= at
  if limit.cost == 0 and taken > 0 then
    row, finish = text, c_end
  end
  return row, told, start, finish + (finish - start), taken, fits, is_new
end

-- Of the call that is looked at: the rows of its counters to come, after a place for its answer; those that count anew
-- and when they are past; which windows are pinned because what is used corrects them.
local counters, past, pinned = { '' }, {}, ''
-- The rows of those of whose rows the answer tells less than they keep, by index; nothing if there are none.
local longer

-- Looks at all limits of a call, and keeps what comes of it. False if one of them is spent, or does not know what day it
-- is; nothing, and why, if a count would not be exact.
local function count_all(limits, k, now)
  local fits = true
  pinned, longer = '', nil
  if #past > 0 then
    past = {}
  end
  for i = 1, #limits do
    local limit, key = limits[i], keys[k + 2 + i]
    local cost, text, row = limit.cost, rows[key], nil
    local start, finish, used, count, is_new
    if text and limit.is_fixed then
      -- What most limits are: a window that goes on.
      start, finish, count = parse(AS_WINDOW, text)
      if now < finish then
        used, row = count, pack(AS_WINDOW, start, finish, count + cost, 0)
      end
    end
    if row then
      fits = fits and used + cost <= limit.limit
    elseif limit.kind <= CODE.SLIDING then
      row, start, finish, used, count, is_new = M.counted(limit, text, now)
      if not row then
        return false
      end
      fits = fits and used + cost <= limit.limit
      if is_new then
        push(past, finish + (finish - start), key)
      end
    else
      local whole, past_at, is_room
      if limit.kind == CODE.MOVING then
        whole, row, start, past_at, count = M.logged(limit, text, now)
        is_room, is_new = whole ~= nil, not text
      else
        whole, row, start, past_at, count, is_room, is_new = M.filled(limit, text, now)
      end
      fits = fits and is_room
      longer = longer or {}
      longer[i] = whole
      push(past, past_at, key)
    end
    if count + cost > MAX_AMOUNT then
      return nil, CODE.RULES
    end
    counters[i + 1] = row
    local meter = limit.meter
    if meter ~= '' then
      local counter = rest(key)
      if is_new and sub(meter, 1, 1) == CODE.COUNTED then
        meter = CODE.BEGUN .. sub(meter, 2)
      end
      pinned = pinned .. pack(AS.PINNED, start, cost, #meter, meter, #counter, counter)
    end
  end
  return fits
end

-- What was counted is kept. Returns the answer, which the counters follow.
local function take_counts(limits, k, answer)
  for i = 1, #limits do
    put(keys[k + 2 + i], longer and longer[i] or counters[i + 1])
  end
  for i = 1, #past, 2 do
    append(rare_of('past'), 'counters', past[i], past[i + 1])
  end
  local n = #limits
  if n == 1 then
    return answer .. counters[2]
  elseif n == 3 then
    return answer .. counters[2] .. counters[3] .. counters[4]
  end
  counters[1] = answer
  return concat(counters, '', 1, n + 1)
end
