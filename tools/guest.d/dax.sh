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

# one PATH EXPECTED_IN_INFO FILESYSTEM FORMAT_OPTIONS...: leaves the tree "dax" on it.
one() {
  path=$1 wanted=$2 kind=$3
  shift 3
  format "$path" "$@"
  daxcrypt info "$path" >/run/info
  grep -q "^granularity .*$wanted" /run/info || fail "$path: $(grep '^granularity' /run/info), wanted $wanted"
  serve "$path"
  attach /dev/nbd0
  make_$kind /dev/nbd0
  mount -t "$kind" /dev/nbd0 /mnt/fs
  write_tree /mnt/fs dax
  verify_tree /mnt/fs dax
  case " $* " in *--allow-discards*) trim "$path" ;; esac
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
  again "$path" "$kind" -C 4
}
# A trimmed file gives its blocks back, also while it is mapped with MAP_SYNC, and takes new ones when it is written to.
trim() {
  head -c 8000000 /dev/urandom >/mnt/fs/temporary
  sync
  rm /mnt/fs/temporary
  sync
  before=$(du -k "$1" | cut -f 1)
  fstrim /mnt/fs
  after=$(du -k "$1" | cut -f 1)
  [ "$after" -lt $((before - 4000)) ] || fail "fstrim left $after KiB of $before KiB"
  write_tree /mnt/fs afterwards
  verify_tree /mnt/fs dax afterwards
}
# again PATH FILESYSTEM NBD_OPTIONS...: a new server shows the same tree.
again() {
  path=$1 kind=$2
  shift 2
  serve "$path"
  attach /dev/nbd0 "$@"
  check_$kind /dev/nbd0
  mount -t "$kind" /dev/nbd0 /mnt/fs
  verify_tree /mnt/fs dax
  umount /mnt/fs
  detach /dev/nbd0
  stop_server
}

one /mnt/dax/vault.img 'cache line.*MAP_SYNC' ext4 --size 40M
umount /mnt/dax
mount -t ext4 -o dax=always /dev/pmem0 /mnt/dax
again /mnt/dax/vault.img ext4
rm /mnt/dax/vault.img
one /mnt/dax/trimmed.img 'cache line.*MAP_SYNC' xfs --size 60M --allow-discards
umount /mnt/dax
check_ext4 /dev/pmem0
one /dev/pmem1 'page: not a DAX mapping, because the block device is not DAX-capable' ext4
one /dev/dax2.0 'cache line: a device-DAX' xfs
kernel_is_quiet
