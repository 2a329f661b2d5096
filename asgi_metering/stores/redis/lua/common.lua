-- What all scripts share: numbers as texts, the time, and when a script must not run now.
-- Amounts never pass tostring, .. or cjson: 2^53 - 1 would come out as 9.007199254741e+15.

local call, fmt, find, sub, match, gmatch, concat, floor =
  redis.call, string.format, string.find, string.sub, string.match, string.gmatch, table.concat, math.floor
local INF = math.huge
local MAX_AMOUNT = 9007199254740991
local GLUE = '\31'

local function int(amount)
  return fmt('%.0f', amount)
end

local function flt(seconds)
  return fmt('%.17g', seconds)
end

-- A time inside JSON text: a float also where it is whole.
local function json_time(seconds)
  local text = fmt('%.17g', seconds)
  if find(text, '[.e]') then
    return text
  end
  return text .. '.0'
end

-- The store's time, as number and as text: the server's, unless a test says what time it is.
local function clock(given)
  if given ~= '' then
    return tonumber(given), given
  end
  local now = call('TIME')
  local text = now[1] .. '.' .. sub('000000', #now[2] + 1) .. now[2]
  return tonumber(text), text
end

-- KEYS[1] is the gate: somebody works alone behind it. KEYS[2] is where a batch is told to stop, so that what follows
-- an operation that could not run here does not overtake it. `token` is the batch's; empty for an operation alone.
local HALT_MS = 10000

local function halt(token)
  if token ~= '' then
    call('SET', KEYS[2], token, 'PX', HALT_MS)
  end
end

local function stopped(gate, halted, token)
  if halted and halted == token then
    return 'H'
  end
  if gate then
    halt(token)
    return 'B'
  end
end

-- For the caller to decide: it has the whole rules.
local function punt(token)
  halt(token)
  return 'S'
end

-- A hold's text, line by line: what changes, parts, windows, who pays, what the call brought (three lines), receipt.
local HOLD = '^([^\n]*)\n([^\n]*)\n([^\n]*)\n([^\n]*)\n([^\n]*)\n([^\n]*)\n([^\n]*)\n(.*)$'
-- state, expires, due, observed, amount, created, mark of a late end
local HOLD_FIRST = '^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)$'
-- ttl, grace, in doubt, unit, line, charge key, idempotency key
local HOLD_OWN = '^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)$'
