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

# Partitions of the kernel's: the tweaks count from the start of the disk, and a partition that dd has moved is noticed.
printf 'label: gpt\nstart=4096, size=49152\nstart=57344, size=49152\n' | sfdisk -q --wipe always /dev/pmem1
wait_for test -b /dev/pmem1p2
one /dev/pmem1p1 aes-256-xts 4096
daxcrypt dmtable /dev/pmem1p1 --key-file $key | grep -q ' 8192 /dev/pmem1p1 4096 1 ' || fail "the tweaks do not begin at sector 8192 of the disk"
dd if=/dev/pmem1p1 of=/dev/pmem1p2 bs=1M conv=fsync status=none
expect_failure daxcrypt info /dev/pmem1p2 2>/run/moved
grep -q '2097152.*29360128' /run/moved || fail "no two numbers: $(cat /run/moved)"
grep -q 'relocate --in-place /dev/pmem1p2' /run/moved || fail "no command: $(cat /run/moved)"
daxcrypt relocate --in-place /dev/pmem1p2 --key-file $key
serve /dev/pmem1p2
attach /dev/nbd0 -b 4096
check_ext4 /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
verify_tree /mnt/fs ours theirs
umount /mnt/fs
detach /dev/nbd0
stop_server
sfdisk -q --delete /dev/pmem1
dd if=/dev/zero of=/dev/pmem1 bs=1M count=2 conv=fsync status=none
kernel_is_quiet
