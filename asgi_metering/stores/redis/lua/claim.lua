-- Take events that nobody has, oldest first. KEYS: gate, halt, events, their order. ARGV: time, token, limit, seconds.
local CHUNK = 100
local row = call('MGET', KEYS[1], KEYS[2])
local stop = M.stopped(row[1], row[2], ARGV[2])
if stop then
  return stop
end
local now = M.clock(ARGV[1])
local limit, lease = tonumber(ARGV[3]), tonumber(ARGV[4])
local taken, from = {}, 0
while #taken < 2 * limit do
  local ids = call('LRANGE', KEYS[4], from, from + CHUNK - 1)
  if #ids == 0 then
    break
  end
  local texts = call('HMGET', KEYS[3], unpack(ids))
  for i = 1, #ids do
    local at, claimed, kept_as, place = parse(AS.EVENT, texts[i])
    if claimed <= now and #taken < 2 * limit then
      local text = pack(AS.EVENT, at, now + lease, kept_as) .. sub(texts[i], place)
      call('HSET', KEYS[3], ids[i], text)
      taken[#taken + 1] = ids[i]
      taken[#taken + 1] = text
    end
  end
  from = from + CHUNK
end
return { 'C', taken }
