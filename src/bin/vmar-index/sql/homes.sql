SELECT image, block,
       first_value(image) OVER content AS home_image,
       first_value(block) OVER content AS home_block
FROM blocks
WINDOW content AS (PARTITION BY hash, variant ORDER BY image, block)
ORDER BY image, block
