-- Append events. KEYS: gate, halt, events, their order, those delivered. ARGV: time, token, then id and text of each.
local row = call('MGET', KEYS[1], KEYS[2])
local stop = M.stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
local at = M.clock(ARGV[1])
for i = 3, #ARGV, 2 do
  local text = pack(AS.EVENT, at, 0, 0) .. ARGV[i + 1]
  if call('HSETNX', KEYS[3], ARGV[i], text) == 1 then
    call('RPUSH', KEYS[4], ARGV[i])
  elseif not call('ZSCORE', KEYS[5], ARGV[i]) then
    call('HSET', KEYS[3], ARGV[i], text)
  end
end
return 'E'
