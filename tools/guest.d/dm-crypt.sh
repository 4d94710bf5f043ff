# Scenario 5: the kernel's dm-crypt reads what was written through us, and we read what dm-crypt wrote.
. /scenarios/lib.sh
mkdir -p /mnt/fs
mark

# one DEVICE CIPHER UNIT
one() {
  format "$1" --force --cipher "$2" --unit "$3"
  serve "$1"
  attach /dev/nbd0 -b "$3"
  make_ext4 /dev/nbd0
  mount -t ext4 /dev/nbd0 /mnt/fs
  write_tree /mnt/fs ours
  umount /mnt/fs
  detach /dev/nbd0
  stop_server

  table=$(daxcrypt dmtable "$1" --show-key --key-file $key)
  dmsetup create witness --table "$table"
  check_ext4 /dev/mapper/witness
  mount -t ext4 -o ro /dev/mapper/witness /mnt/fs
  verify_tree /mnt/fs ours
  mount -o remount,rw /mnt/fs
  write_tree /mnt/fs theirs
  umount /mnt/fs
  dmsetup remove witness

  serve "$1"
  attach /dev/nbd0 -b "$3"
  check_ext4 /dev/nbd0
  mount -t ext4 /dev/nbd0 /mnt/fs
  verify_tree /mnt/fs ours theirs
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
}

truncate -s 50M /run/loop.img
loop=$(losetup -f --show /run/loop.img)
for cipher in aes-128-xts aes-256-xts; do
  for unit in 512 4096; do
    one "$loop" $cipher $unit
    one /dev/pmem1 $cipher $unit
  done
done
losetup -d "$loop"
rm /run/loop.img
kernel_is_quiet
