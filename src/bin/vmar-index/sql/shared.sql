SELECT count(*) AS blocks
FROM blocks AS a
WHERE a.image = 1
  AND EXISTS (SELECT 1 FROM blocks AS b WHERE b.image = 0 AND b.hash = a.hash AND b.variant = a.variant)
