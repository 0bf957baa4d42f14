-- Returns results of the indices asked for, empty where there is none, until they exceed a number of bytes.
-- KEYS: result.  ARGV: most bytes of all but the first, indices...  O(k).
local found, left = {}, tonumber(ARGV[1])
for i = 2, #ARGV do
  local result = redis.call('HGET', KEYS[1], ARGV[i]) or ''
  left = left - #result
  if left < 0 and #found > 0 then break end
  found[#found + 1] = result
end
return found
