# Scenario 7: bad sectors under the backing reach the client as EIO, those and no others; the server and all else go on.
. /scenarios/lib.sh
mark
truncate -s 18M /run/media.img
media=$(losetup -f --show /run/media.img)
total=$(blockdev --getsz "$media")
dmsetup create backing --table "0 $total linear $media 0"
loop=$(losetup -f --show /dev/mapper/backing)
format "$loop" --label bad
format /run/other.img --size 4M --label other

# Data of the export, on a block device, so that the write-back under it is the kernel's.
head -c 16777216 /dev/urandom >/run/data.img
head -c 4194304 /run/data.img >/run/data-other.img
serve "$loop" /run/other.img
attach /dev/nbd0 -N bad
attach /dev/nbd1 -N other
dd if=/run/data.img of=/dev/nbd0 bs=1M oflag=direct conv=fsync
dd if=/run/data-other.img of=/dev/nbd1 bs=1M oflag=direct conv=fsync
detach /dev/nbd0
detach /dev/nbd1
stop_server
sync

# table FIRST: 8 bad sectors at FIRST, 16 at FIRST + 4096, in sectors of the backing.
damage() {
  dmsetup suspend backing
  dmsetup load backing <<END
0 $1 linear $media 0
$1 8 error
$(($1 + 8)) 4088 linear $media $(($1 + 8))
$(($1 + 4096)) 16 error
$(($1 + 4112)) $((total - $1 - 4112)) linear $media $(($1 + 4112))
END
  dmsetup resume backing
  blockdev --flushbufs /dev/mapper/backing
  blockdev --flushbufs "$loop"
  echo 3 >/proc/sys/vm/drop_caches
}
first=16384           # logical sector, 8 MiB
damage $((first + 4096)) # the data begins 2 MiB into the backing

serve "$loop" /run/other.img
attach /dev/nbd0 -N bad
attach /dev/nbd1 -N other
read_page() { dd if=/dev/nbd0 of=/run/page bs=4096 count=1 skip="$1" iflag=direct; }
same_page() { dd if=/run/data.img bs=4096 count=1 skip="$1" | cmp - /run/page; }

for page in $(seq 2040 2056) $(seq 2556 2567); do
  case $page in
    2048 | 2560 | 2561)
      expect_failure read_page $page
      read_page $page 2>&1 | grep 'Input/output error' || fail "page $page: not EIO"
      ;;
    *)
      read_page $page || fail "page $page is not bad"
      same_page $page || fail "page $page differs"
      ;;
  esac
done
# Sectors, not only pages: the neighbours of the bad ones are read one by one.
for sector in 16383 16392 20479 20496; do dd if=/dev/nbd0 of=/run/page bs=512 count=1 skip=$sector iflag=direct; done
for sector in 16384 16391 20480 20495; do expect_failure dd if=/dev/nbd0 of=/run/page bs=512 count=1 skip=$sector iflag=direct; done
expect_failure dd if=/run/data.img of=/dev/nbd0 bs=4096 count=1 skip=2048 seek=2048 oflag=direct
# Writing and flushing elsewhere go on; the bytes are the old ones, so that all can be compared below.
dd if=/run/data.img of=/dev/nbd0 bs=4096 count=8 skip=2049 seek=2049 oflag=direct conv=notrunc,fsync
# compare BLOCK_KIB SKIP COUNT: everything between the bad places, in larger reads.
compare() {
  dd if=/dev/nbd0 of=/run/part bs="$1k" skip="$2" count="$3" iflag=direct
  dd if=/run/data.img bs="$1k" skip="$2" count="$3" | cmp - /run/part || fail "data differs in $3 blocks of $1 KiB at $2"
}
compare 512 0 16
compare 64 129 31
compare 64 161 7
compare 512 21 11
rm /run/part
dd if=/dev/nbd1 bs=1M iflag=direct | cmp - /run/data-other.img
kill -0 "$server" || fail "the server is gone"

# Repaired media: the same server reads what was there.
dmsetup suspend backing
dmsetup load backing --table "0 $total linear $media 0"
dmsetup resume backing
dd if=/dev/nbd0 bs=1M iflag=direct | cmp - /run/data.img
detach /dev/nbd0
detach /dev/nbd1
stop_server

# Each error that the kernel saw on the export is one of the bad sectors.
dmesg | sed -n 's/.*I\/O error, dev nbd[0-9]*, sector \([0-9]*\) .*/\1/p' >/run/sectors
[ -s /run/sectors ] || fail "the kernel logged no error of nbd0"
while read -r sector; do
  { [ "$sector" -ge 16384 ] && [ "$sector" -lt 16392 ]; } || { [ "$sector" -ge 20480 ] && [ "$sector" -lt 20496 ]; } ||
    fail "an I/O error at sector $sector, which is not bad"
done </run/sectors
losetup -d "$loop"
dmsetup remove backing
losetup -d "$media"
rm /run/*.img
kernel_is_quiet 'I/O error, dev (nbd0|loop[0-9]|dm-[0-9]), sector|Buffer I/O error on dev (nbd0|loop[0-9]|dm-[0-9])'
