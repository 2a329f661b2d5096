-- Append events. KEYS: gate, halt, events, their order. ARGV: time, token, then id and text of each.
local row = call('MGET', KEYS[1], KEYS[2])
local stop = M.stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
local at = M.clock(ARGV[1])
for i = 3, #ARGV, 2 do
  if call('HSET', KEYS[3], ARGV[i], pack(AS.EVENT, at, 0, 0) .. ARGV[i + 1]) == 1 then
    call('RPUSH', KEYS[4], ARGV[i])
  end
end
return 'E'
