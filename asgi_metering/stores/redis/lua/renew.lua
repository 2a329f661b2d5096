-- A heartbeat. KEYS: gate, halt, hold. ARGV: time, token, observed. Answers 1, or 0 for a hold that does not live.
local row = call('MGET', unpack(KEYS))
local stop = stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
local text = row[3]
if not text then
  return 0
end
local first, parts, windows, payer, own, pools, facts, receipt = match(text, HOLD)
if receipt ~= '' then
  return 0
end
local now = clock(ARGV[1])
local state, expires, _, observed, amount, created, mark = match(first, HOLD_FIRST)
local ttl, grace = match(own, '^([^\t]*)\t([^\t]*)')
expires = math.max(now + tonumber(ttl), tonumber(expires))
observed = math.max(tonumber(observed), tonumber(ARGV[3]))
local changed = { state, flt(expires), flt(expires + tonumber(grace)), int(observed), amount, created, mark }
call('SET', KEYS[3], concat({ concat(changed, '\t'), parts, windows, payer, own, pools, facts, '' }, '\n'))
local prefix = sub(KEYS[1], 1, -5)
local member = sub(KEYS[3], #prefix + 3)
local account = sub(match(payer, '^[^\t]*'), #prefix + 3)
local at = flt(expires)
call('ZADD', prefix .. 'l:' .. account, at, member)
call('ZADD', prefix .. 'z:due', 'LT', at, account)
for pool in gmatch(pools, '[^\t]+') do
  call('ZADD', pool, at, member)
  call('ZADD', prefix .. 'z:pools', 'LT', at, pool)
end
return 1
