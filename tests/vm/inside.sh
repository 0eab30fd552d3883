#!/bin/sh
# What is looked at inside the virtual machine, told on standard output, and whether it was
# as it should be.
#
#   inside.sh ROOT [SUITE[:TEST]...]    ROOT is where the repository lies
root=$1
shift
socket=/run/conclave/conclave.sock
group=/sys/fs/cgroup/system.slice/conclave.service
failed=0

title() { printf '\n== %s\n' "$*"; }

# check WHAT COMMAND...: runs it, and says whether it succeeded.
check() {
    what=$1
    shift
    if "$@"; then
        echo "ok: $what"
    else
        echo "FAILED: $what"
        failed=$((failed + 1))
    fi
}

ask() {
    curl -sS --unix-socket "$socket" -H 'Content-Type: application/json' \
        -d "@$root/tests/policies/requests/$1" "http://localhost/validate/pod-guard"
}

# as USER COMMAND...
as() {
    user=$1
    shift
    setpriv --reuid=$user --regid=$user --clear-groups env -C / "$@"
}

has() { grep -qF -- "$1" "$2"; }
is() { [ "$(cat "$1")" = "$2" ]; }
has_no_process() { ! grep -lsx conclave /proc/[0-9]*/comm && ! grep -lsx conclave-worker /proc/[0-9]*/comm; }

title "The machine"
uname -srv
systemctl --version | head -n 1
echo "security modules: $(cat /sys/kernel/security/lsm 2>/dev/null)"
echo "controllers: $(cat /sys/fs/cgroup/cgroup.controllers)"

useradd --system --no-create-home --shell /usr/sbin/nologin tester
install -m 755 "$root/target/debug/conclave" "$root/target/debug/conclave-worker" /usr/bin
install -m 644 "$root/systemd/conclave.service" /etc/systemd/system
mkdir /etc/conclave
cp "$root"/tests/policies/built/*.wasm /etc/conclave
# Without the largest one, which an emulated processor compiles for minutes.
cat >/etc/conclave/policies.yml <<END
pod-guard: { module: pod-guard.wasm }
raw-gate: { module: raw-gate.wasm, memory: 64Mi, settings: { validUsers: [tonio], validActions: [eats], validResources: [hay] } }
END
# What this kernel lacks; whether the branch barrier is there is the processor's business.
case $(uname -r) in
6.1.*) lacking="write-execute denied, control group, code sealed, " ;;
6.12.*) lacking="control group, " ;;
esac

for user in root tester; do
    title "conclave sandbox, as $user"
    as $user conclave sandbox >/tmp/report
    check "every required layer is there" [ $? = 0 ]
    cat /tmp/report
    sed -n 's/ (not required): .*/, /p' /tmp/report | grep -v 'branch barrier' | tr -d '\n' >/tmp/lacking
    check "what is lacking is what this kernel does not have" is /tmp/lacking "$lacking"
done

title "The service under systemd"
check "the service starts" systemctl start conclave
until journalctl -q -u conclave | grep -q 'all policies were tried' ||
    ! systemctl -q is-active conclave; do sleep 0.5; done
journalctl -q -o cat -u conclave >/tmp/log
cat /tmp/log
check "control groups are used" has 'controllers="memory pids cpu"' /tmp/log
# A guest's 128 MiB, or what its policy says, and 512 MiB for all else; a worker and its successor.
for policy in pod-guard:640 raw-gate:576; do
    workers=$group/workers/p.${policy%:*}
    echo "$workers: memory.max $(cat $workers/memory.max), pids.max $(cat $workers/pids.max)"
    check "a limit on memory is set" is "$workers/memory.max" $((${policy#*:} << 20))
    check "a limit on processes is set" is "$workers/pids.max" 2
done
conclave sandbox --daemon $socket >/tmp/report
check "a running daemon is reported" [ $? = 0 ]
cat /tmp/report
check "each worker is in a control group" grep -q 'control group *2 of 2' /tmp/report
ask pod-privileged.json | tee /tmp/answer
echo
check "a privileged pod is refused" has '"allowed":false' /tmp/answer
ask pod-ok.json | tee /tmp/answer
echo
check "another one is let in" has '"allowed":true' /tmp/answer
check "the service stops" systemctl stop conclave
check "it ended well" [ "$(systemctl show -P Result conclave)" = success ]
check "no process is left" has_no_process
check "no control group is left" [ ! -e $group ]
check "no socket is left" [ ! -e /run/conclave ]

# Left out, since they run out of time on an emulated processor: compiling the largest policy,
# compiling while a request waits, starting 150 workers, and compiling 22 policies at once.
slow="--skip readiness_comes_when_every_policy_serves --skip a_request_that_comes_too_early
    --skip many_policies_of_one_module --skip an_answer_that_is_not_a_verdict"

export CONCLAVE_TESTS_PREBUILT=1
for suite in "$@"; do
    # SUITE or SUITE:TEST.
    tests=${suite#"${suite%%:*}"}
    program=$(echo "$root/target/debug/deps/${suite%%:*}"-*)
    for user in root tester; do
        title "Suite $suite, as $user"
        start=$(cut -d. -f1 /proc/uptime)
        as $user timeout 900 "$program" --test-threads=1 --color never $slow ${tests#:}
        code=$?
        check "suite $suite, as $user, in $(($(cut -d. -f1 /proc/uptime) - start)) s" [ $code = 0 ]
    done
done

echo
if [ $failed = 0 ]; then
    echo "RESULT: everything was as it should be"
else
    echo "RESULT: $failed FAILED"
fi
