-- Rate limits: what each would count after a call. Mirrors look in rules/windows.py.

CODE.FIXED, CODE.CALENDAR, CODE.SLIDING = 0, 1, 2

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

function M.limits_of(text)
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

-- Of the call that is looked at: the rows of its counters to come, after a place for its answer; those that count anew
-- and when they are past; which windows are pinned because what is used corrects them.
local counters, past, pinned = { '' }, {}, ''

-- Looks at all limits of a call, and keeps what comes of it. False if one of them is spent, or does not know what day it
-- is; nothing, and why, if a count would not be exact.
local function count_all(limits, k, now)
  local fits = true
  pinned = ''
  if #past > 0 then
    past = {}
  end
  for i = 1, #limits do
    local limit, key = limits[i], keys[k + 2 + i]
    local cost, text, row = limit.cost, rows[key], nil
    local start, finish, used, count, is_new
    if text and limit.is_fixed then
      -- What most limits are: a window that goes on.
      start, finish, count = parse(AS.WINDOW, text)
      if now < finish then
        used, row = count, pack(AS.WINDOW, start, finish, count + cost, 0)
      end
    end
    if not row then
      row, start, finish, used, count, is_new = M.counted(limit, text, now)
      if not row then
        return false
      end
    end
    if count + cost > CODE.MAX_AMOUNT then
      return nil, CODE.RULES
    end
    fits = fits and used + cost <= limit.limit
    counters[i + 1] = row
    if is_new then
      push(past, finish + (finish - start), key)
    end
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
  local gone = work.gone
  for i = 1, #limits do
    local key = keys[k + 2 + i]
    rows[key], changed[key], gone[key] = counters[i + 1], true, nil
  end
  for i = 1, #past, 2 do
    append(rare_of('past'), 'counters', past[i], past[i + 1])
  end
  counters[1] = answer
  return concat(counters, '', 1, #limits + 1)
end
