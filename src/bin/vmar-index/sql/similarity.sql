WITH held AS (
    SELECT hash, variant, image, count(*) AS copies FROM blocks GROUP BY hash, variant, image
)
SELECT a.image AS image, b.image AS other, sum(a.copies) AS blocks
FROM held AS a JOIN held AS b ON a.hash = b.hash AND a.variant = b.variant
GROUP BY a.image, b.image
ORDER BY image, other
