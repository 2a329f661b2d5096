-- What admissions and ends share: calendars, counters and parts as texts.

-- The window of `bounds` (texts) that holds `now`, as index, start, end; nil outside of them all.
local function pick(bounds, now)
  local index = 0
  for i = 1, #bounds do
    if tonumber(bounds[i]) > now then
      break
    end
    index = i
  end
  if index > 0 and index < #bounds then
    return index, tonumber(bounds[index]), tonumber(bounds[index + 1])
  end
end

local function words(text, separator)
  local list = {}
  for word in gmatch(text, '[^' .. separator .. ']+') do
    list[#list + 1] = word
  end
  return list
end

local COUNTER = '^(%S+)\t(%S+)\t(%S+)\t(%S+)$'

local function counter_text(start, finish, used, previous)
  return concat({ flt(start), flt(finish), int(used), int(previous) }, '\t')
end

local function put_counter(key, start, finish, used, previous)
  put(key, counter_text(start, finish, used, previous))
end

-- Parts as a hold keeps them, and back; and as JSON, as receipts and ledger lines keep them.
local function parts_text(parts)
  local items = {}
  for i, part in ipairs(parts) do
    items[i] = concat({ part[1], part[2], int(part[3]), part[4] }, GLUE)
  end
  return concat(items, '\t')
end

local PART = '^([^\31]*)\31([^\31]*)\31([^\31]*)\31(.*)$'

local function parts_of(text)
  local parts = {}
  for item in gmatch(text, '[^\t]+') do
    local source, start, amount, name = match(item, PART)
    parts[#parts + 1] = { source, start, tonumber(amount), name }
  end
  return parts
end

local function parts_json(parts)
  local items = {}
  for i, part in ipairs(parts) do
    items[i] = concat({ '["' .. part[1] .. '"', part[4], part[2], int(part[3]) .. ']' }, ',')
  end
  return '[' .. concat(items, ',') .. ']'
end
