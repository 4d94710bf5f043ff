# Scenario 7: bad sectors under the backing reach the client as EIO, those and no others; the server and all else go on.
. /scenarios/lib.sh
mkdir -p /mnt/fs
mark
truncate -s 8M /run/media.img
media=$(losetup -f --show /run/media.img)
total=$(blockdev --getsz "$media")
dmsetup create backing --table "0 $total linear $media 0"
loop=$(losetup -f --show /dev/mapper/backing)
format "$loop" --label bad
format /run/other.img --size 2M --label other
data_start=4096 # the data begins 2 MiB into the backing; in sectors, as everything here

# load: the backing becomes the table on standard input, and nothing of it is cached.
load() {
  dmsetup suspend backing
  dmsetup load backing
  dmsetup resume backing
  blockdev --flushbufs /dev/mapper/backing
  blockdev --flushbufs "$loop"
  echo 3 >/proc/sys/vm/drop_caches
}
# bad START COUNT [START COUNT]: sectors of the export that can be neither read nor written from now on.
bad() {
  {
    at=0
    while [ $# -gt 0 ]; do
      start=$(($1 + data_start))
      echo "$at $((start - at)) linear $media $at"
      echo "$start $2 error"
      at=$((start + $2))
      shift 2
    done
    echo "$at $((total - at)) linear $media $at"
  } | load
}
good() { echo "0 $total linear $media 0" | load; }
serve_both() {
  serve "$loop" /run/other.img
  attach /dev/nbd0 -N bad
  attach /dev/nbd1 -N other
}
stop_both() {
  detach /dev/nbd0
  detach /dev/nbd1
  stop_server
}

# As a block device: every page and the sectors around the bad ones.
head -c 6291456 /dev/urandom >/run/data.img
head -c 2097152 /run/data.img >/run/data-other.img
serve_both
dd if=/run/data.img of=/dev/nbd0 bs=1M oflag=direct conv=fsync
dd if=/run/data-other.img of=/dev/nbd1 bs=1M oflag=direct conv=fsync
stop_both
bad 4096 8 8192 16 # pages 512, 1024 and 1025
serve_both
read_page() { dd if=/dev/nbd0 of=/run/page bs=4096 count=1 skip="$1" iflag=direct; }
for page in $(seq 508 516) $(seq 1021 1030); do
  case $page in
    512 | 1024 | 1025)
      expect_failure read_page $page
      read_page $page 2>&1 | grep 'Input/output error' || fail "page $page: not EIO"
      ;;
    *)
      read_page $page || fail "page $page is not bad"
      dd if=/run/data.img bs=4096 count=1 skip=$page | cmp - /run/page || fail "page $page differs"
      ;;
  esac
done
read_sector() { dd if=/dev/nbd0 of=/run/page bs=512 count=1 skip="$1" iflag=direct; }
for sector in 4095 4104 8191 8208; do read_sector $sector || fail "sector $sector is not bad"; done
for sector in 4096 4103 8192 8207; do expect_failure read_sector $sector; done
expect_failure dd if=/run/data.img of=/dev/nbd0 bs=4096 count=1 skip=512 seek=512 oflag=direct
# Writing and flushing elsewhere go on; the bytes are the old ones, so that all can be compared below.
dd if=/run/data.img of=/dev/nbd0 bs=4096 count=8 skip=513 seek=513 oflag=direct conv=notrunc,fsync
# compare FROM TO: pages between the bad places, in larger reads.
compare() {
  dd if=/dev/nbd0 bs=64k iflag=direct,skip_bytes,count_bytes skip=$(($1 * 4096)) count=$((($2 - $1) * 4096)) >/run/part
  dd if=/run/data.img bs=64k iflag=skip_bytes,count_bytes skip=$(($1 * 4096)) count=$((($2 - $1) * 4096)) | cmp - /run/part || fail "pages $1 to $2 differ"
}
compare 0 512
compare 513 1024
compare 1026 1536
rm /run/part
dd if=/dev/nbd1 bs=1M iflag=direct | cmp - /run/data-other.img
kill -0 "$server" || fail "the server is gone"
# Each error that the kernel saw on the export is one of the bad sectors.
since_mark | sed -n 's/.*I\/O error, dev nbd0, sector \([0-9]*\) .*/\1/p' >/run/sectors
[ -s /run/sectors ] || fail "the kernel logged no error of nbd0"
while read -r sector; do
  { [ "$sector" -ge 4096 ] && [ "$sector" -lt 4104 ]; } || { [ "$sector" -ge 8192 ] && [ "$sector" -lt 8208 ]; } ||
    fail "an I/O error at sector $sector, which is not bad"
done </run/sectors
stop_both

# A page that failed stays bad for the server that met it. On repaired media, a new one reads what was there.
good
serve_both
dd if=/dev/nbd0 bs=1M iflag=direct | cmp - /run/data.img

# Through a filesystem: reading and fsync of the file that lies there fail with EIO, the others know nothing.
mkfs.ext4 -q -b 4096 -O ^has_journal /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
head -c 40000 /dev/urandom >/mnt/fs/victim
write_tree /mnt/fs bystander
umount /mnt/fs
block=$(debugfs -R 'blocks /victim' /dev/nbd0 2>/dev/null | awk '{ print $3 }')
stop_both
bad $((block * 8)) 8
serve_both
mount -t ext4 /dev/nbd0 /mnt/fs
verify_tree /mnt/fs bystander
cat /mnt/fs/victim 2>&1 >/run/part | grep 'Input/output error' || fail "reading the victim: not EIO"
[ "$(wc -c </run/part)" -eq 8192 ] || fail "$(wc -c </run/part) bytes of the victim could be read, not the first 8192"
dd if=/dev/urandom of=/mnt/fs/victim bs=4096 count=1 seek=2 conv=notrunc,fsync 2>&1 | grep 'Input/output error' || fail "fsync of the victim: not EIO"
dd if=/run/data.img of=/mnt/fs/after bs=4096 count=10 conv=fsync || fail "another file cannot be written any more"
verify_tree /mnt/fs bystander
dd if=/run/data.img bs=4096 count=10 | cmp - /mnt/fs/after
umount /mnt/fs
dd if=/dev/nbd1 bs=1M iflag=direct | cmp - /run/data-other.img
stop_both

losetup -d "$loop"
dmsetup remove backing
losetup -d "$media"
rm /run/*.img
kernel_is_quiet 'I/O error, dev (nbd0|loop[0-9]|dm-[0-9]), sector|Buffer I/O error on dev(ice)? (nbd0|loop[0-9]|dm-[0-9])|block nbd0: Other side returned error .5.|EXT4-fs warning .device nbd0.: ext4_end_bio'
