-- What workers tell each other of their providers' answers, each unless a newer one is kept. Mirrors share in
-- rules/readings.py. KEYS: gate, halt, readings, the same by time. ARGV: time, token, how many are kept at most, then
-- name, time and text of each.
local row = call('MGET', KEYS[1], KEYS[2])
local stop = M.stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
local now, most = M.clock(ARGV[1]), tonumber(ARGV[3])
local answer = {}
for i = 4, #ARGV, 3 do
  local name, at = ARGV[i], tonumber(ARGV[i + 1])
  local text = call('HGET', KEYS[3], name)
  local known = text and parse(AS.READING, text)
  if not known or at >= known or known > now then
    if not known and call('HLEN', KEYS[3]) >= most then
      local oldest = call('ZRANGE', KEYS[4], 0, 0)[1]
      call('HDEL', KEYS[3], oldest)
      call('ZREM', KEYS[4], oldest)
    end
    at = min(at, now)
    text = pack(AS.READING, at) .. ARGV[i + 2]
    call('HSET', KEYS[3], name, text)
    call('ZADD', KEYS[4], M.flt(at), name)
  end
  answer[#answer + 1] = text
end
return { 'N', answer }
