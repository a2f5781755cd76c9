WITH held AS (
    SELECT hash, variant, image, count(*) AS copies FROM blocks GROUP BY hash, variant, image
), contents AS (
    SELECT array_agg(image ORDER BY image) AS images, sum(copies) AS copies FROM held GROUP BY hash, variant
)
SELECT images, count(*) AS contents, sum(copies) AS blocks
FROM contents
GROUP BY images
ORDER BY blocks DESC, images
