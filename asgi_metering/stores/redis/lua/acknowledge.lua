-- Forget events. KEYS: gate, halt, events, their order. ARGV: time, token, ids.
local row = call('MGET', KEYS[1], KEYS[2])
local stop = M.stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
-- An id that comes twice counts twice, as in the rules: they look before they take away.
local known = 0
for i = 3, #ARGV do
  known = known + call('HEXISTS', KEYS[3], ARGV[i])
end
for i = 3, #ARGV do
  if call('HDEL', KEYS[3], ARGV[i]) == 1 then
    call('LREM', KEYS[4], 1, ARGV[i])
  end
end
return { 'A', known }
