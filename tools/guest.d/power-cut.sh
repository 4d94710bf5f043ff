# Scenario 6, inside: verifies what the killed boot had reported as durable, then writes and reports until it is killed too.
# Two exports: "file" lies in a file on ext4 -o dax, "raw" on a pmem device. The serial port is the witness: a line
# `DURABLE PLACE NAME BYTES SHA256` is sent after the fsync of that file returned.
. /scenarios/lib.sh
round=$1
last=$2
mkdir -p /mnt/dax /mnt/file /mnt/raw

fail() {
  echo "POWER FAILED $*"
  exit 0
}

prepare() {
  ndctl create-namespace -f -e namespace0.0 -m fsdax >/run/out 2>&1 || fail "ndctl: $(tail -n 1 /run/out)"
  mkfs.ext4 -q -b 4096 /dev/pmem0
  mount -t ext4 -o dax=always /dev/pmem0 /mnt/dax
  format /mnt/dax/vault.img --size 40M --label file
  format /dev/pmem1 --label raw
}

open_exports() {
  serve /mnt/dax/vault.img /dev/pmem1 >/run/serve.out 2>&1
  attach /dev/nbd0 -N file >/run/out 2>&1
  attach /dev/nbd1 -N raw >/run/out 2>&1
}

# verify PLACE: every file that was durable has its bytes; an appended file may have more.
verify() {
  grep "^$1 " /expected >/run/expected || return 0
  while read -r _ name bytes sum; do
    [ -f "/mnt/$1/$name" ] || fail "$1/$name is missing"
    [ "$(head -c "$bytes" "/mnt/$1/$name" | sha256sum | cut -d ' ' -f 1)" = "$sum" ] || fail "$1/$name differs"
  done </run/expected
  echo "POWER VERIFIED $1 $(wc -l </run/expected) files"
}

report() { echo "DURABLE $1 $2 $(wc -c <"/mnt/$1/$2") $(sha256sum "/mnt/$1/$2" | cut -d ' ' -f 1)"; }

# New files of odd sizes, old ones removed, and one file that grows in place.
write_for_ever() {
  n=0
  while :; do
    n=$((n + 1))
    dd if=/dev/urandom of="/mnt/$1/f$n" bs=$((n * 977 % 40009 + 1)) count=1 conv=fsync 2>/dev/null
    report "$1" f$n
    dd if=/dev/urandom of="/mnt/$1/log" bs=123 count=1 oflag=append conv=notrunc,fsync 2>/dev/null
    report "$1" log
    if [ $n -gt 100 ]; then
      echo "REMOVING $1 f$((n - 100))"
      rm "/mnt/$1/f$((n - 100))"
    fi
  done
}

mark
if [ "$round" = 0 ]; then
  prepare
  open_exports
  for device in nbd0 nbd1; do mkfs.ext4 -q -J size=4 /dev/$device; done
else
  mount -t ext4 -o dax=always /dev/pmem0 /mnt/dax || fail "the outer file system does not mount"
  open_exports
fi
mount -t ext4 /dev/nbd0 /mnt/file || fail "file does not mount"
mount -t ext4 /dev/nbd1 /mnt/raw || fail "raw does not mount"
for place in file raw; do verify $place; done
for place in file raw; do umount /mnt/$place; done
for device in nbd0 nbd1; do e2fsck -fn /dev/$device >/run/out 2>&1 || fail "e2fsck $device: $(tail -n 1 /run/out)"; done
complaints >/run/complaints
[ ! -s /run/complaints ] || fail "the kernel: $(head -n 1 /run/complaints)"
if [ "$round" = "$last" ]; then
  echo "POWER FINISHED"
  exit 0
fi
mount -t ext4 /dev/nbd0 /mnt/file
mount -t ext4 /dev/nbd1 /mnt/raw
rm -f /mnt/file/* /mnt/raw/* 2>/dev/null || true
sync
write_for_ever file &
write_for_ever raw &
sleep 0.1
echo "POWER WRITING"
wait
