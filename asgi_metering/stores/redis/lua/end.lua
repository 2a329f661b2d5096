-- End a hold, once: settle or release, with its slots, keys, weighted limits and usage event. Mirrors rules/settlement.py.
-- KEYS: gate, halt, hold. ARGV: time, token, the call's id as JSON, amount or '', basis, whether it is an estimate, who
-- ends it, whether the call failed, event or '', reply or '', then meter and actual count in turn.
-- Answers {'E', receipt}; {'X', the first receipt} for a hold that has ended; {'U', now} for one that nobody knows.

local token = ARGV[2]
local row = call('MGET', unpack(KEYS))
local stop = stopped(row[1], row[2], token)
if stop then
  return stop
end
local now, now_text = clock(ARGV[1])
if not row[3] then
  return { 'U', now_text }
end
local id, amount, basis, estimated, by = ARGV[3], tonumber(ARGV[4]), ARGV[5], ARGV[6], ARGV[7]
local failed, told, reply = ARGV[8] == '1', ARGV[9], ARGV[10]
local first, parts, windows, who, own, pools, facts, receipt = match(row[3], HOLD)
local state, expires, due, observed, held, created, mark = match(first, HOLD_FIRST)
if receipt ~= '' then
  if by ~= 'call' or mark == 'c' then
    return { 'X', receipt }
  end
  return punt(token)
end
local _, _, _, unit, line, charge_key, idempotency_key = match(own, HOLD_OWN)
local account, payer = match(who, '^([^\t]*)\t([^\t]*)')
local account_text = call('GET', account)
local sums
if account_text then
  sums = { match(account_text, SUMS) }
  local seen = tonumber(sums[9])
  if seen > now then
    now, now_text = seen, json_time(seen)
  end
end
if not amount then
  basis = 'none'
end
local rest = sub(account, #prefix + 3)
local member = sub(KEYS[3], #prefix + 3)
local book, charged, number = nil, 0, 'null'

local function receipt_text(its_id, its_held, spent, left)
  return '[' .. concat({
    its_id, payer, unit, int(charged), its_held, '"' .. basis .. '"', estimated, '"' .. by .. '"', parts_json(spent),
    left, now_text, number, 'true,null,true]',
  }, ',')
end

local function window_key(part)
  local name = cjson.decode('[' .. part[4] .. ']')[1]
  name = string.gsub(name, '[%c%%]', function(char)
    return fmt('%%%02x', string.byte(char))
  end)
  return prefix .. 'w:' .. rest .. GLUE .. name .. GLUE .. flt(tonumber(part[2]))
end

-- Where the charge came from: allowances one by one, the wallet's parts together. False if what was held is gone.
local function consume(its_parts, left, spent)
  local at = 1
  while at <= #its_parts do
    local run = { its_parts[at] }
    local is_window = run[1][1] == 'allowance'
    at = at + 1
    while not is_window and at <= #its_parts and its_parts[at][1] ~= 'allowance' do
      run[#run + 1] = its_parts[at]
      at = at + 1
    end
    local take = left
    if at <= #its_parts then
      local sum = 0
      for _, part in ipairs(run) do
        sum = sum + part[3]
      end
      take = math.min(left, sum)
    end
    left = left - take
    if is_window then
      local key = window_key(run[1])
      local text = call('GET', key)
      if text then
        local start, finish, settled, kept = match(text, COUNTER)
        settled = tonumber(settled) + take
        if settled > MAX_AMOUNT then
          return false
        end
        put(key, concat({ start, finish, int(settled), int(tonumber(kept) - run[1][3]) }, '\t'))
      elseif run[1][3] > 0 then
        return false
      end
      if take > 0 then
        spent[#spent + 1] = { 'allowance', run[1][2], take, run[1][4] }
      end
    elseif not settle(book, run, take, spent) then
      return false
    end
  end
  return left == 0 or settle(book, {}, left, spent)
end

-- Charge `wanted` for held parts; returns the receipt's text, or nothing if it takes the whole rules.
local function charge(its_id, its_held, its_parts, wanted)
  local spent = {}
  charged = wanted
  if #its_parts == 0 and wanted == 0 then
    return receipt_text(its_id, its_held, spent, 'null')
  end
  book = open_book(account, sums, now, now_text)
  if not consume(its_parts, wanted, spent) then
    return nil
  end
  if wanted > 0 then
    number = write(book, 'settle', wanted, its_id, line, '"' .. basis .. '"', estimated, parts_json(spent))
  end
  close_book(book, INF)
  if not is_exact(book) then
    return nil
  end
  local left = int(available(book))
  if #its_parts > 0 then
    left = 'null'
    for _, part in ipairs(its_parts) do
      if part[1] ~= 'allowance' then
        left = int(available(book))
      end
    end
  end
  return receipt_text(its_id, its_held, spent, left)
end

local target = amount and 'settled' or 'released'
local late = by == 'call' and 'c' or 'o'

local function ended(its_first, its_receipt, its_state, middle)
  local i_expires, i_due, i_observed, i_held, i_created = match(its_first, '^[^\t]*\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)')
  return concat({ its_state, i_expires, i_due, i_observed, i_held, i_created, late }, '\t') .. '\n' .. middle .. '\n' .. its_receipt
end

local gone, over, over_key
local told_held = held
if charge_key == '' then
  receipt = charge(id, held, parts_of(parts), amount or 0)
else
  receipt = receipt_text(id, held, {}, 'null')
  local known = call('GET', charge_key)
  local k_start, k_end, k_members, k_settled, k_hold
  if known then
    k_start, k_end, k_members, k_settled, k_hold = match(known, '^(%S+)\t(%S+)\t(%S+)\t(%S)\t(.*)$')
  end
  if known and tonumber(created) >= tonumber(k_start) then
    local members = int(math.max(0, tonumber(k_members) - 1))
    local owned = k_settled == '0' and call('GET', k_hold)
    if k_settled == '1' then
      put(charge_key, concat({ k_start, k_end, members, '1', k_hold }, '\t'))
    elseif not owned then
      return punt(token)
    else
      local o_first, o_parts, o_windows, o_who, o_own, o_pools, o_facts, o_receipt = match(owned, HOLD)
      local _, _, _, _, o_held = match(o_first, HOLD_FIRST)
      local middle = concat({ o_parts, o_windows, o_who, o_own, o_pools, o_facts }, '\n')
      if o_receipt ~= '' or match(o_who, '^[^\t]*') ~= account then
        return punt(token)
      elseif amount then
        receipt = charge(id, o_held, parts_of(o_parts), tonumber(o_held))
        put(charge_key, concat({ k_start, k_end, members, '1', k_hold }, '\t'))
        told_held = o_held
        over = receipt and ended(o_first, receipt, 'settled', middle)
      elseif members ~= '0' then
        put(charge_key, concat({ k_start, k_end, members, '0', k_hold }, '\t'))
      else
        local name = string.gsub(sub(k_hold, #prefix + 3), '%%(%x%x)', function(code)
          return string.char(tonumber(code, 16))
        end)
        local its = charge(cjson.encode(name), o_held, parts_of(o_parts), 0)
        if not its then
          return punt(token)
        end
        gone = charge_key
        over = ended(o_first, its, 'released', middle)
      end
      if over then
        over_key = k_hold
        put(k_hold, over)
      end
    end
  end
end
if not receipt then
  return punt(token)
end
put(KEYS[3], ended(first, receipt, target, concat({ parts, windows, who, own, pools, facts }, '\n')))

-- What waits for the end: the idempotency key, and the windows of weighted limits.
local is_free
if idempotency_key ~= '' then
  local text = call('GET', idempotency_key)
  local claim, holder
  if text then
    claim, holder = match(text, '^(%S+\t([^\t]*)[^\n]*)')
  end
  if holder == KEYS[3] then
    if failed and charged == 0 then
      is_free = true
    else
      put(idempotency_key, claim .. '\n' .. receipt .. '\n' .. reply)
    end
  end
end
local actual = {}
for i = 11, #ARGV, 2 do
  actual[ARGV[i]] = tonumber(ARGV[i + 1])
end
for pin in gmatch(windows, '[^\t]+') do
  local start, taken, meter, key = match(pin, PART)
  local used = actual[meter]
  local text = used and call('GET', key)
  if text then
    local c_start, c_end, c_used, c_previous = match(text, COUNTER)
    c_start, c_end, c_used, c_previous = tonumber(c_start), tonumber(c_end), tonumber(c_used), tonumber(c_previous)
    start = tonumber(start)
    local delta = used - tonumber(taken)
    if c_start == start then
      put_counter(key, c_start, c_end, math.max(0, c_used + delta), c_previous)
    elseif c_start - (c_end - c_start) == start then
      put_counter(key, c_start, c_end, c_used, math.max(0, c_previous + delta))
    end
  end
end

-- From here on everything is written.
flush()
if book then
  note_account(book)
end
if gone then
  call('DEL', gone)
  call('ZREM', prefix .. 'z:charge', gone)
end
if is_free then
  call('DEL', idempotency_key)
  call('ZREM', prefix .. 'z:idempotency', idempotency_key)
end
local at = now_text
if over_key then
  local other = sub(over_key, #prefix + 3)
  call('ZREM', prefix .. 'l:' .. rest, member, other)
  call('ZADD', prefix .. 'z:ended', at, member, at, other)
else
  call('ZREM', prefix .. 'l:' .. rest, member)
  call('ZADD', prefix .. 'z:ended', at, member)
end
for pool in gmatch(pools, '[^\t]+') do
  call('ZREM', pool, member)
end
if told ~= '' then
  local function inner(json)
    local text = sub(json, 2, -2)
    return text == '' and '' or text .. ','
  end
  -- Of a name that comes twice the last one counts.
  local payload = concat({
    '{"started_at":', created, ',', inner(facts), inner(told), '"id":', id, ',"payer":', payer,
    ',"unit":', unit, ',"line":', line, ',"amount":', int(charged), ',"held":', told_held,
    ',"basis":"', basis, '","estimated":', estimated, ',"ended_at":', now_text, '}',
  })
  if call('HSET', prefix .. 'events', member, now_text .. '\t0.0\t' .. payload) == 1 then
    call('RPUSH', prefix .. 'events:order', member)
  end
end
return { 'E', receipt }
