SELECT CAST(0 AS BIGINT) AS image, CAST(0 AS BIGINT) AS rank, hash, variant, CAST(block AS BIGINT) AS block FROM run_0
