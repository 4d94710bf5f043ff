# Scenario 6, inside: verifies what the killed boot had reported as durable, then writes and reports until it is killed too.
# Two exports: "file" lies in a file on ext4 -o dax, "raw" on a pmem device. The serial port is the witness.
. /scenarios/lib.sh
. /scenarios/durable.sh
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

# verify PLACE: every file that was durable has its bytes.
verify() {
  verify_durable "$1" /expected
  echo "POWER VERIFIED $1 $(grep -c "^$1 " /expected) files"
}

mark
if [ "$round" = 0 ]; then
  prepare
  open_exports
  for device in nbd0 nbd1; do make_ext4 /dev/$device; done
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
for place in file raw; do write_for_ever $place & done
sleep 0.1
echo "POWER WRITING"
wait
