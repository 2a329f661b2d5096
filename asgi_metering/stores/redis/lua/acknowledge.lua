-- Nobody gets these events again. KEYS: gate, halt, events, their order, those delivered. ARGV: time, token, ids.
local row = call('MGET', KEYS[1], KEYS[2])
local stop = M.stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
-- An id that comes twice counts twice, as in the rules: they look before they take away.
local waiting = {}
for i = 3, #ARGV do
  if call('HEXISTS', KEYS[3], ARGV[i]) == 1 and not call('ZSCORE', KEYS[5], ARGV[i]) then
    waiting[#waiting + 1] = ARGV[i]
  end
end
local now = M.flt(M.clock(ARGV[1]))
for _, id in ipairs(waiting) do
  if call('ZADD', KEYS[5], 'NX', now, id) == 1 then
    call('LREM', KEYS[4], 1, id)
  end
end
return { 'A', #waiting }
