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
    limit.bounds = M.doubles_of(bounds)
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

-- Looks at all limits of a call, and keeps for it their rows to come. False if one of them is spent, or does not know
-- what day it is; nothing, and why, if a count would not be exact.
function M.count(ask)
  local fits = true
  for i, limit in ipairs(ask.limits) do
    local key = keys[ask.k + 2 + i]
    local row, start, finish, used, count, is_new = M.counted(limit, work.rows[key], ask.now)
    if not row then
      return false
    end
    if count + limit.cost > CODE.MAX_AMOUNT then
      return nil, CODE.RULES
    end
    fits = fits and used + limit.cost <= limit.limit
    ask.counters[i + 1] = row
    if is_new then
      M.push(ask.past, M.flt(finish + (finish - start)), key)
    end
    if limit.meter ~= '' then
      local counter, meter = M.rest(key), limit.meter
      if is_new and sub(meter, 1, 1) == CODE.COUNTED then
        meter = CODE.BEGUN .. sub(meter, 2)
      end
      ask.pinned = ask.pinned .. pack(AS.PINNED, start, limit.cost, #meter, meter, #counter, counter)
    end
  end
  return fits
end
