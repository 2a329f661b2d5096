-- A heartbeat. Mirrors renew in rules/settlement.py. Its key: hold. Its word: what was observed.
-- Answers 1, or 0 for a hold that does not live.
function M.renew(k, a, _, at)
  local key = keys[k + 1]
  local text = rows[key]
  if not text then
    return 0
  end
  local size, state, expires, _, observed, _, _, ttl, grace, _, who, rare = parse(AS.HOLD, text)
  if size < #text then
    return 0
  end
  expires = max(now_is + ttl, expires)
  observed = max(observed, (parse('>d', args[a], at)))
  put(key, pack('>I4Bddd', size, state, expires, expires + grace, observed) .. sub(text, 30))
  local member = rest(key)
  lives(parse('>I4c0', who), expires, member)
  if rare ~= '' then
    local _, pools_text = parse(AS.RARE, rare)
    for _, pool in ipairs(M.texts_of(pools_text)) do
      M.lease(prefix .. 'q:' .. pool, member, expires)
    end
  end
  return 1
end
