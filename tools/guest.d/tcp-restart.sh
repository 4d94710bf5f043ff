. /scenarios/lib.sh
fail "not written yet"
