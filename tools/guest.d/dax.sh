# Scenario 4: the backing is a file on ext4 mounted with -o dax, a raw /dev/pmemN, and a devdax device.
. /scenarios/lib.sh
mkdir -p /mnt/dax /mnt/fs
mark
ndctl create-namespace -f -e namespace0.0 -m fsdax
ndctl create-namespace -f -e namespace2.0 -m devdax
wait_for test -b /dev/pmem0
wait_for test -c /dev/dax2.0
mkfs.ext4 -q -b 4096 /dev/pmem0
mount -t ext4 -o dax=always /dev/pmem0 /mnt/dax

# one PATH EXPECTED_IN_INFO FORMAT_OPTIONS...
one() {
  path=$1 wanted=$2
  shift 2
  format "$path" "$@"
  daxcrypt info "$path" | tee /run/info
  grep -q "^granularity .*$wanted" /run/info || fail "$path: $(grep '^granularity' /run/info), wanted $wanted"
  serve "$path"
  attach /dev/nbd0
  mkfs.ext4 -q -b 4096 -J size=4 /dev/nbd0
  mount -t ext4 /dev/nbd0 /mnt/fs
  write_tree /mnt/fs dax
  verify_tree /mnt/fs dax
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
  serve "$path"
  attach /dev/nbd0 -b 4096 -C 4
  check_ext4 /dev/nbd0
  mount -t ext4 /dev/nbd0 /mnt/fs
  verify_tree /mnt/fs dax
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
}

one /mnt/dax/vault.img MAP_SYNC --size 64M
umount /mnt/dax
mount -t ext4 -o dax=always /dev/pmem0 /mnt/dax
serve /mnt/dax/vault.img
attach /dev/nbd0
mount -t ext4 /dev/nbd0 /mnt/fs
verify_tree /mnt/fs dax
umount /mnt/fs
detach /dev/nbd0
stop_server
umount /mnt/dax
check_ext4 /dev/pmem0
one /dev/pmem1 ""
one /dev/dax2.0 "[Cc]ache"
kernel_is_quiet
