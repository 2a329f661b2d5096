-- What all scripts share: how rows are packed, the time, and when a script must not run now.
-- Numbers are packed as doubles, which are exact up to 2^53, and never pass tostring or `..`, which round.

local sub, match, concat, floor, min, max =
  string.sub, string.match, table.concat, math.floor, math.min, math.max
local next, unpack = next, unpack
local pack, parse = struct.pack, struct.unpack

-- M has the functions, AS how rows are packed, CODE what numbers stand for, `work` what this script has read and is to
-- write. What runs for every call is also a local: a field costs several times as much.
local M, AS, CODE, work = {}, {}, {}, nil

-- Of the call: where this text is a library, each has its own.
local keys, args, call

CODE.INF = math.huge
CODE.MAX_AMOUNT = 9007199254740991
CODE.GLUE = '\31'

-- Rows, as stores/redis/packing.py packs them too. A text is its length and its bytes.
-- granted, settled, held, expired, debt, entries, next change, next due, seen; then the open grants in burn order
AS.ACCOUNT, CODE.ACCOUNT_SIZE, CODE.DUE_AT, CODE.SEEN_AT = '>ddddddddd', 72, 57, 65
-- amount, priority, begins, ends, number, settled, held, expired, begun, reversed, id, what never counts
AS.GRANT = '>ddddddddddI4c0I4c0'
-- An account of one grant.
AS.BOOK = AS.ACCOUNT .. sub(AS.GRANT, 2)
-- its size without the receipt, whether it is in doubt, expires, due, observed, amount, created, ttl, grace, parts, who
-- pays, what is rare, line; then the basis in doubt, the facts, and the receipt once there is one
AS.HOLD, CODE.PARTS_AT = '>I4BdddddddI4c0I4c0I4c0I4c0', 62
-- Up to its parts, and what that takes; texts are joined: packing takes long ones letter by letter.
AS.NEW_HOLD, CODE.NEW_HOLD_SIZE = '>I4BdddddddI4', 65
-- account, payer, unit, group: who pays
AS.WHO = '>I4c0I4c0I4c0I4c0'
-- pinned windows, pools, charge key, idempotency key: what is rare
AS.RARE = '>I4c0I4c0I4c0I4c0'
-- source, start, amount, name
AS.PART = '>BddI4c0'
-- start, taken, meter, counter
AS.PINNED = '>ddI4c0I4c0'
-- how the hold has ended, whether the call's own end may still come, basis, whether that is an estimate, who ended it,
-- which of these are known, amount, held, available, at, entry, late, id, parts
AS.RECEIPT = '>BBBBBBddddddI4c0I4c0'
-- kind, basis, whether it is an estimate, number, at, amount, available, ref, line, parts; then actor and id
AS.ENTRY = '>BBBddddI4c0I4c0I4c0'
AS.NEW_ENTRY = AS.ENTRY .. 'I4I4'
-- start, end, used, previous of a counter; start, end, settled, held of an allowance's window. Behind a counter stands
-- what only some kinds keep: 'm' and the times of a moving log, or 'b' and what a bucket has seen, its pace, its fill, and
-- since when it was not full before
AS.WINDOW = '>dddd'
-- start, end, members, whether it is settled; then the hold that it owns
AS.CHARGE_KEY = '>dddB'
-- expires, hold, fingerprint, reply, who pays; then the receipt once there is one
AS.IDEMPOTENCY = '>dI4c0I4c0I4c0I4c0'
-- at, claimed until, how the rest is kept: 0 JSON, 1 what the end told and the hold
AS.EVENT = '>ddB'
AS.NEW_EVENT, CODE.AS_HOLD = AS.EVENT .. 'I4', 1
-- when a reading was observed; then what it tells, JSON
AS.READING = '>d'

CODE.SETTLED, CODE.RELEASED = 0, 1
CODE.OPEN_TO_LATE, CODE.CLOSED = 0, 1
CODE.FROM_GRANT, CODE.FROM_ALLOWANCE, CODE.FROM_DEBT = 0, 1, 2

-- The store's time: the server's, unless a test says what time it is.
function M.clock(given)
  if given ~= '' then
    return tonumber(given)
  end
  local now = call('TIME')
  return tonumber(now[1]) + tonumber(now[2]) / 1000000
end

-- A time as a score or in a key: with all its digits.
local last_seconds, last_text
function M.flt(seconds)
  if seconds ~= last_seconds then
    last_seconds, last_text = seconds, string.format('%.17g', seconds)
  end
  return last_text
end

-- KEYS[1] is the gate: somebody works alone behind it. KEYS[2] is where commands on their way are told to stop, so that
-- what follows an operation that could not run here does not overtake it. `token` is theirs; empty for a lone command.
local HALT_MS = 10000

function M.halt(token)
  if token ~= '' then
    call('SET', keys[2], token, 'PX', HALT_MS)
  end
end

function M.stopped(gate, halted, token)
  if halted and halted == token then
    return 'H'
  end
  if gate then
    M.halt(token)
    return 'B'
  end
end
