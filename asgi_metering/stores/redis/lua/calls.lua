-- Admissions, ends and heartbeats that wait together: each decided in order on what those before it left, all written
-- at the end. KEYS: gate, halt, then those of each operation. ARGV: time, token, then the words of each operation, the
-- first of which begins with its letter, and how many keys and words it has.
-- Answers a reply for each operation. The last one is 'S' for an operation that the rules have to run, 'N' for one that
-- a script of its own has to; what follows it was not run. 'T' alone: nothing was written, run them one by one.
local RUN = { A = M.admit, E = M.finish, R = M.renew, P = M.part }

-- How much of the first word of each operation says what it is.
local HEAD, HEAD_SIZE = '>cHH', 5

-- Of each operation: its letter, the places before its keys and of its first word, and how many keys it has. Kept from
-- script to script: what stands behind the last operation is of former ones.
local letters, at_keys, at_words, numbers_of_keys = {}, {}, {}, {}

-- What the operations are. Returns how many. The accounts of calls that end stand in their holds: those that nobody named
-- are read together.
local function operations_of(found)
  local n, k, a, n_args = 0, 2, 3, #args
  local wanted, n_wanted, last, account, account_key = {}, 0, nil, nil, nil
  while a <= n_args do
    local letter, n_keys, n_words = parse(HEAD, args[a])
    n = n + 1
    letters[n], at_keys[n], at_words[n], numbers_of_keys[n] = letter, k, a, n_keys
    if letter == 'E' then
      local text = found[k + 1]
      if text then
        local _, who = parse('>I4c0I4c0', text, PARTS_AT)
        if who ~= last then
          last, account = who, parse('>I4c0', who)
          account_key = before_account .. account
          if rows[account_key] == nil then
            -- Known from now on, and so wanted once.
            rows[account_key] = false
            n_wanted = n_wanted + 1
            wanted[n_wanted] = account_key
          end
        end
        whose[k], whose_key[k] = account, account_key
      else
        whose[k], whose_key[k] = false, false
      end
    end
    k, a = k + n_keys, a + n_words
  end
  if n_wanted > 0 then
    local texts = call('MGET', unpack(wanted, 1, n_wanted))
    for i = 1, n_wanted do
      rows[wanted[i]] = texts[i]
    end
  end
  return n
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
  now_is = M.clock(args[1])
  local replies = {}
  for i = 1, operations_of(found) do
    local reply, why, is_begun = RUN[letters[i]](at_keys[i], at_words[i], numbers_of_keys[i], HEAD_SIZE + 1)
    if not reply then
      M.halt(token)
      if is_begun and i > 1 then
        return 'T'
      end
      replies[i] = why
      if is_begun then
        return replies
      end
      break
    end
    replies[i] = reply
  end
  M.flush()
  return replies
end
