-- What all scripts share: how rows are packed, the time, and when a script must not run now.
-- Numbers are packed as doubles, which are exact up to 2^53, and never pass tostring or `..`, which round.

local call, sub, match, gmatch, concat, floor, min, max =
  redis.call, string.sub, string.match, string.gmatch, table.concat, math.floor, math.min, math.max
local pack, parse = struct.pack, struct.unpack
local INF = math.huge
local MAX_AMOUNT = 9007199254740991
local GLUE = '\31'

-- Rows, as stores/redis/packing.py packs them too. A text is its length and its bytes.
-- granted, settled, held, expired, debt, entries, next change, next due, seen; then the open grants in burn order
local ACCOUNT = '>ddddddddd'
-- amount, priority, begins, ends, number, settled, held, expired, begun, reversed, id, what never counts
local GRANT = '>ddddddddddI4c0I4c0'
-- its size without the receipt, whether it is in doubt, expires, due, observed, amount, created, ttl, grace, parts, who
-- pays, what is rare, line; then the basis in doubt, the facts, and the receipt once there is one
local HOLD = '>I4BdddddddI4c0I4c0I4c0I4c0'
local NEW_HOLD, NEW_HOLD_SIZE = '>I4BdddddddI4c0I4c0I4c0c0', 73
-- account, payer, unit, group: who pays
local WHO = '>I4c0I4c0I4c0I4c0'
-- pinned windows, pools, charge key, idempotency key: what is rare
local RARE = '>I4c0I4c0I4c0I4c0'
-- source, start, amount, name
local PART = '>BddI4c0'
-- start, taken, meter, counter
local PINNED = '>ddI4c0I4c0'
-- how the hold has ended, whether the call's own end may still come, basis, whether that is an estimate, who ended it,
-- which of these are known, amount, held, available, at, entry, late, id, parts
local RECEIPT = '>BBBBBBddddddI4c0I4c0'
-- kind, basis, whether it is an estimate, number, at, amount, available, ref, line, parts; then actor and id
local ENTRY = '>BBBddddI4c0I4c0I4c0'
local NEW_ENTRY = ENTRY .. 'I4I4'
-- start, end, used, previous of a counter; start, end, settled, held of an allowance's window
local WINDOW = '>dddd'
-- start, end, members, whether it is settled; then the hold that it owns
local CHARGE_KEY = '>dddB'
-- expires, hold, fingerprint, reply, who pays; then the receipt once there is one
local IDEMPOTENCY = '>dI4c0I4c0I4c0I4c0'
-- at, claimed until, how the rest is kept: 0 JSON, 1 what the end told and the hold
local EVENT = '>ddB'
local NEW_EVENT, AS_HOLD = '>ddBI4c0c0', 1

local SETTLED, RELEASED = 0, 1
local OPEN_TO_LATE, CLOSED = 0, 1
local FROM_GRANT, FROM_ALLOWANCE, FROM_DEBT = 0, 1, 2

-- The store's time: the server's, unless a test says what time it is.
local function clock(given)
  if given ~= '' then
    return tonumber(given)
  end
  local now = call('TIME')
  return tonumber(now[1]) + tonumber(now[2]) / 1000000
end

-- A time as a score or in a key: with all its digits.
local last_seconds, last_text
local function flt(seconds)
  if seconds ~= last_seconds then
    last_seconds, last_text = seconds, string.format('%.17g', seconds)
  end
  return last_text
end

-- KEYS[1] is the gate: somebody works alone behind it. KEYS[2] is where commands on their way are told to stop, so that
-- what follows an operation that could not run here does not overtake it. `token` is theirs; empty for a lone command.
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
