SELECT rank, block,
       first_value(rank) OVER content AS home_rank,
       first_value(block) OVER content AS home_block
FROM blocks
WINDOW content AS (PARTITION BY hash, variant ORDER BY rank, block)
ORDER BY rank, block
