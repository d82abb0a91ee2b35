#!/bin/bash
# usage: bash join.sh FILES_AT NAME DEST   joins the parts of a codec that train_gpu.sh returned, e.g. join.sh DIR codec-0 gpu27/codec
mkdir -p "$3"; cat "$1"/"$2".part* > "$3"/model.safetensors; tar xzOf "$1"/logs.tgz "$2".config.json > "$3"/config.json; ls -la "$3"
