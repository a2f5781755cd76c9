#!/usr/bin/env python3
"""Looks at objects of an S3 server, and harms them, behind vmar's back.

usage: s3_objects.py ENDPOINT BUCKET VERB [ARGUMENT...]

  make                 makes the bucket
  keys PREFIX          prints the keys below it
  class KEY            prints its storage class
  truncate KEY BYTES   leaves so many bytes of it
  flip KEY OFFSET      changes one byte
  copy KEY KEY2        puts the content of the first where the second was
  remove KEY
  fill PREFIX N        so many packs that are none, before all real ones in the order of names
"""

import sys

import boto3

endpoint, bucket, verb, arguments = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]
s3 = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b")


def get(key):
    return s3.get_object(Bucket=bucket, Key=key)["Body"].read()


def put(key, data):
    s3.put_object(Bucket=bucket, Key=key, Body=data)


def keys(prefix):
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for found in page.get("Contents", []):
            yield found["Key"]


if verb == "make":
    s3.create_bucket(Bucket=bucket)
elif verb == "keys":
    for key in keys(*arguments):
        print(key)
elif verb == "class":
    # Of the standard class an answer says nothing.
    print(s3.head_object(Bucket=bucket, Key=arguments[0]).get("StorageClass", "STANDARD"))
elif verb == "truncate":
    put(arguments[0], get(arguments[0])[: int(arguments[1])])
elif verb == "flip":
    data, at = bytearray(get(arguments[0])), int(arguments[1])
    data[at] ^= 0x10
    put(arguments[0], bytes(data))
elif verb == "copy":
    put(arguments[1], get(arguments[0]))
elif verb == "remove":
    s3.delete_object(Bucket=bucket, Key=arguments[0])
elif verb == "fill":
    for n in range(int(arguments[1])):
        put(f"{arguments[0]}{n:064x}.pack", b"no pack")
else:
    sys.exit(__doc__)
