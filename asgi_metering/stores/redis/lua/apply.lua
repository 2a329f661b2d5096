-- Write what was decided elsewhere, if everything that was read for it is still the same.
-- KEYS[1] the gate. ARGV: our token at the gate or '', number of reads, reads, number of writes, writes.
-- A read is its length, its words, and what it answered: '-' | '$' text | '*' length texts.
-- Answers 1; 0 if something has changed; -1 if somebody else works alone.

local at

local function next_words()
  local count = tonumber(ARGV[at])
  local words = {}
  for i = 1, count do
    words[i] = ARGV[at + i]
  end
  at = at + count + 1
  return words
end

local function next_answer()
  local kind = ARGV[at]
  at = at + 1
  if kind == '-' then
    return false
  end
  if kind == '$' then
    at = at + 1
    return ARGV[at - 1]
  end
  return next_words()
end

local function same(found, expected)
  if type(expected) ~= 'table' then
    return found == expected
  end
  if type(found) ~= 'table' or #found ~= #expected then
    return false
  end
  for i = 1, #expected do
    if found[i] ~= expected[i] then
      return false
    end
  end
  return true
end

local gate = call('GET', KEYS[1])

-- What no single command does.
local OWN = {
  -- index, member, sorted set: the member's score becomes the set's first one.
  FIRST = function(words)
    local first = call('ZRANGE', words[4], 0, 0, 'WITHSCORES')
    if first[2] then
      call('ZADD', words[2], first[2], words[3])
    else
      call('ZREM', words[2], words[3])
    end
  end,
  -- index, member, list of lines: the member's score becomes the time of the first line.
  OLDEST = function(words)
    local line = call('LINDEX', words[4], 0)
    if line then
      local _, _, _, _, time = parse(AS.ENTRY, line)
      call('ZADD', words[2], M.flt(time), words[3])
    else
      call('ZREM', words[2], words[3])
    end
  end,
  -- index of an account's lines, its checkpoint, member, number: where a line is found by what it is about.
  REF = function(words)
    local checkpoint = call('GET', words[3])
    if tonumber(words[5]) > (checkpoint and tonumber(match(checkpoint, '^%d+')) or 0) then
      call('ZADD', words[2], 0, words[4])
    end
  end,
  -- events, their order, id, text, those delivered
  EVENT = function(words)
    if call('HSETNX', words[2], words[4], words[5]) == 1 then
      call('RPUSH', words[3], words[4])
    elseif not call('ZSCORE', words[6], words[4]) then
      call('HSET', words[2], words[4], words[5])
    end
  end,
  -- gate, milliseconds: it is not opened behind this.
  KEEP = function(words)
    call('PEXPIRE', words[2], words[3])
    gate = nil
  end,
}

if gate and gate ~= ARGV[1] then
  return -1
end
local reads = tonumber(ARGV[2])
at = 3
for _ = 1, reads do
  local words = next_words()
  if not same(call(unpack(words)), next_answer()) then
    return 0
  end
end
local writes = tonumber(ARGV[at])
at = at + 1
for _ = 1, writes do
  local words = next_words()
  local own = OWN[words[1]]
  if own then
    own(words)
  else
    call(unpack(words))
  end
end
if gate then
  call('DEL', KEYS[1])
end
return 1
