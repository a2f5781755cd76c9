WITH shared AS (
    SELECT hash, variant FROM blocks GROUP BY hash, variant HAVING min(image) < max(image)
), stretches AS (
    SELECT a.image, a.block - row_number() OVER (PARTITION BY a.image ORDER BY a.block) AS stretch
    FROM blocks AS a JOIN shared AS b ON a.hash = b.hash AND a.variant = b.variant
), runs AS (
    SELECT image, stretch, count(*) AS blocks FROM stretches GROUP BY image, stretch
)
SELECT image, sum(blocks) AS blocks, count(*) AS runs
FROM runs
GROUP BY image
ORDER BY image
