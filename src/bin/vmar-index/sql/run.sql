SELECT CAST(0 AS BIGINT) AS image, hash, variant, CAST(block AS BIGINT) AS block FROM run_0
