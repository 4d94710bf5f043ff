# What was reported as durable must be there later. Shared by the scenarios that kill something, and by tools/guest.
# A line `DURABLE PLACE NAME BYTES SHA256` is written after the fsync of /mnt/PLACE/NAME has returned.

report() { echo "DURABLE $1 $2 $(wc -c <"/mnt/$1/$2") $(sha256sum "/mnt/$1/$2" | cut -d ' ' -f 1)"; }

# write_for_ever PLACE: new files of odd sizes, old ones removed, and one file that grows in place. Ends with the first
# error, so that nothing is reported whose fsync has failed.
write_for_ever() {
  n=0
  while :; do
    n=$((n + 1))
    dd if=/dev/urandom of="/mnt/$1/f$n" bs=$((n * 977 % 40009 + 1)) count=1 conv=fsync 2>/dev/null || return 0
    report "$1" f$n
    dd if=/dev/urandom of="/mnt/$1/log" bs=123 count=1 oflag=append conv=notrunc,fsync 2>/dev/null || return 0
    report "$1" log
    if [ $n -gt 100 ]; then
      echo "REMOVING $1 f$((n - 100))"
      rm "/mnt/$1/f$((n - 100))" || return 0
    fi
  done
}

# durable LOG: `PLACE NAME BYTES SHA256` of each file that was reported, less those whose removal had begun. Only whole
# lines count.
durable() {
  tr -d '\r' <"$1" | awk '
    $1 == "DURABLE" && NF == 5 && length($5) == 64 { file[$2 " " $3] = $4 " " $5 }
    $1 == "REMOVING" && NF == 3 { delete file[$2 " " $3] }
    END { for (name in file) print name, file[name] }' | sort
}

# verify_durable PLACE LIST: every file of the list has its bytes; one that grew may have more.
verify_durable() {
  grep "^$1 " "$2" >/run/expected || return 0
  while read -r _ name bytes sum; do
    [ -f "/mnt/$1/$name" ] || fail "$1/$name is missing"
    [ "$(head -c "$bytes" "/mnt/$1/$name" | sha256sum | cut -d ' ' -f 1)" = "$sum" ] || fail "$1/$name differs"
  done </run/expected
}
