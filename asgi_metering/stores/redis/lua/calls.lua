-- Admissions, ends and heartbeats that wait together: each decided in order on what those before it left, all written
-- at the end. KEYS: gate, halt, then those of each operation. ARGV: time, token, then the words of each operation, the
-- first of which begins with its letter, and how many keys and words it has.
-- Answers a reply for each operation. The last one is 'S' for an operation that the rules have to run, 'N' for one that
-- a script of its own has to; what follows it was not run. 'T' alone: nothing was written, run them one by one.
local RUN = { A = M.admit, E = M.finish, R = M.renew, P = M.part }

-- The accounts of calls that end stand in their holds: those that nobody named are read together.
function M.fetch_accounts(found)
  local wanted, n, before, last = {}, 0, work.prefix .. 'a:', nil
  local k, a = 2, 3
  while a <= #args do
    local letter, n_keys, n_words = parse('>cHH', args[a])
    local text = letter == 'E' and found[k + 1]
    if text then
      local _, who = parse('>I4c0I4c0', text, CODE.PARTS_AT)
      local key = who ~= last and before .. parse('>I4c0', who)
      if key and rows[key] == nil then
        -- Known from now on, and so wanted once.
        rows[key] = false
        n = n + 1
        wanted[n] = key
      end
      last = who
    end
    k, a = k + n_keys, a + n_words
  end
  if n > 0 then
    local texts = call('MGET', unpack(wanted, 1, n))
    for i = 1, n do
      rows[wanted[i]] = texts[i]
    end
  end
end

function M.calls(its_keys, its_args)
  M.begin(its_keys, its_args)
  local token = args[2]
  local found = call('MGET', unpack(keys))
  local stop = M.stopped(found[1], found[2], token)
  if stop then
    return stop
  end
  for i = 3, #keys do
    rows[keys[i]] = found[i]
  end
  work.now_is = M.clock(args[1])
  M.fetch_accounts(found)
  local replies, k, a = {}, 2, 3
  while a <= #args do
    local letter, n_keys, n_words, at = parse('>cHH', args[a])
    local reply, why, is_begun = RUN[letter](k, a, n_keys, at)
    if not reply then
      M.halt(token)
      if is_begun and #replies > 0 then
        return 'T'
      end
      replies[#replies + 1] = why
      if is_begun then
        return replies
      end
      break
    end
    replies[#replies + 1] = reply
    k, a = k + n_keys, a + n_words
  end
  M.flush()
  return replies
end
