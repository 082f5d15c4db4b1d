#!/bin/bash
# A real Slurm on one machine, without systemd; all its state lies in one folder. Debian or Ubuntu, as root.
#
#   slurm/local-cluster.sh install         Slurm from the distribution's packages
#   slurm/local-cluster.sh start           munged [mariadbd slurmdbd] slurmctld slurmd x nodes
#   slurm/local-cluster.sh stop            ends exactly the daemons that `start` started
#   slurm/local-cluster.sh status
#   eval "$(slurm/local-cluster.sh env)"   points sbatch, srun, squeue, ... at this cluster
#   slurm/local-cluster.sh node-kill node2 | node-start node2
#
# Settings, from the environment; `start` keeps them in the folder, so the other commands only need the folder:
set -u
folder=${HPCPAR_SLURM_DIR:-${TMPDIR:-/tmp}/hpcpar-slurm-$(id -u)}
# shellcheck disable=SC1091
[ "${1:-}" != start ] && [ -r "$folder/settings" ] && . "$folder/settings"
nodes=${HPCPAR_SLURM_NODES:-${nodes:-4}}
cpus=${HPCPAR_SLURM_CPUS:-${cpus:-16}}                  # pretended, a node
memory_mib=${HPCPAR_SLURM_MEMORY_MIB:-${memory_mib:-64000}}  # pretended, a node
gpus=${HPCPAR_SLURM_GPUS:-${gpus:-8}}                   # pretended, a node; 0 = none
accounting=${HPCPAR_SLURM_ACCOUNTING:-${accounting:-1}} # 1: sacct works (mariadb and slurmdbd); 0: lighter, no sacct
port=${HPCPAR_SLURM_PORT:-${port:-26817}}               # slurmctld; slurmdbd + 2, slurmd number i + 10 + i
slurmd_timeout_s=${HPCPAR_SLURM_TIMEOUT_S:-10}          # seconds until a dead slurmd's node is down
extra_conf=${HPCPAR_SLURM_EXTRA_CONF:-}                 # more lines for slurm.conf
export SLURM_CONF=$folder/etc/slurm.conf

say() { echo "local-cluster: $*" >&2; }
die() { say "$*"; exit 1; }

install() {
    export DEBIAN_FRONTEND=noninteractive
    local packages="munge slurmctld slurmd slurm-client"
    [ "$accounting" = 1 ] && packages="$packages slurmdbd slurm-wlm-mysql-plugin mariadb-server"
    # shellcheck disable=SC2086
    apt-get update -q && apt-get install -y -q --no-install-recommends $packages
}

write_slurm_conf() {
    local i gres=""
    [ "$gpus" -gt 0 ] && gres="Gres=gpu:$gpus"
    cat <<X
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/run/munge.sock
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
TmpFS=$folder/tmp/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_min_interval=100000,batch_sched_delay=0
PriorityType=priority/basic
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=5
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=$slurmd_timeout_s
InactiveLimit=0
KillWait=5
MinJobAge=300
MessageTimeout=10
Waittime=0
JobRequeue=1
RebootProgram=/bin/true
GresTypes=gpu
DefMemPerCPU=100
X
    if [ "$accounting" = 1 ]; then
        printf 'AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n'
        # sacctmgr finds a private munge socket through the "password" only
        printf 'AccountingStoragePort=%s\nAccountingStoragePass=%s\n' $((port + 2)) "$folder/run/munge.sock"
        echo AccountingStorageTRES=gres/gpu
    else
        echo AccountingStorageType=accounting_storage/none
    fi
    for i in $(seq 1 "$nodes"); do
        echo "NodeName=node$i NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 10 + i)) CPUs=$cpus" \
            "RealMemory=$memory_mib $gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO"
    echo "$extra_conf"
}

write_slurmdbd_conf() {
    cat <<X
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.sock
DbdHost=localhost
DbdPort=$((port + 2))
SlurmUser=root
LogFile=$folder/log/slurmdbd.log
PidFile=$folder/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
X
}

configure() {
    local i program
    mkdir -p "$folder"/{bin,etc,log,run,state,spool,tmp,dev,mysql} && chmod 755 "$folder" "$folder"/* || die "no folder"
    for program in slurmctld slurmd slurmstepd; do
        # By these names: started as slurmd-wlm (where Debian keeps it), Slurm silently drops every Gres= line
        for i in "/usr/sbin/$program-wlm" "$(command -v $program)"; do
            [ -x "$i" ] && { ln -sf "$i" "$folder/bin/$program"; break; }
        done
    done
    [ -s "$folder/etc/munge.key" ] || (umask 077; head -c 1024 /dev/urandom > "$folder/etc/munge.key")
    for i in $(seq 1 "$nodes"); do
        mkdir -p "$folder/tmp/node$i" "$folder/spool/node$i"; chmod 1777 "$folder/tmp/node$i"
    done
    { cat /etc/hosts; for i in $(seq 1 "$nodes"); do echo "127.0.0.1 node$i"; done; } > "$folder/etc/hosts"
    write_slurm_conf > "$SLURM_CONF"
    (umask 077; write_slurmdbd_conf > "$folder/etc/slurmdbd.conf")
    printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' > "$folder/etc/cgroup.conf"
    : > "$folder/etc/gres.conf"
    for i in $(seq 0 $((gpus - 1))); do
        [ -e "$folder/dev/gpu$i" ] || mknod "$folder/dev/gpu$i" c 1 3
    done
    [ "$gpus" -gt 0 ] && echo "Name=gpu File=$folder/dev/gpu[0-$((gpus - 1))]" > "$folder/etc/gres.conf"
    printf '%s=%s\n' nodes "$nodes" cpus "$cpus" memory_mib "$memory_mib" gpus "$gpus" accounting "$accounting" \
        port "$port" > "$folder/settings"
}

# Is the process in this pid file (maybe stale, its number reused) a daemon of this cluster? Signal nothing else.
pid_of() { cat "$folder/run/$1.pid" 2>/dev/null; }
alive() {
    local pid; pid=$(pid_of "$1"); [ -n "$pid" ] && [ -r "/proc/$pid/cmdline" ] || return 1
    case "$(tr '\0' ' ' < "/proc/$pid/cmdline")" in
        *"$folder"/*) return 0 ;;
        slurmdbd*) tr '\0' '\n' < "/proc/$pid/environ" | grep -qx "SLURM_CONF=$SLURM_CONF" ;;
        *) return 1 ;;
    esac
}
wait_for() {  # SECONDS COMMAND...
    local end=$((SECONDS + $1)); shift
    until "$@" > /dev/null 2>&1; do [ $SECONDS -ge $end ] && return 1; sleep 0.05; done
}
all_up() { [ "$(sinfo -h -N -t idle,mix,alloc -o %N | wc -l)" -ge "$nodes" ]; }

# What runs on a node has its name as its host's and finds the others' in /etc/hosts, where root may make namespaces
on_node() {
    local name=$1; shift
    unshare --uts --mount true 2> /dev/null || { "$@"; return; }
    # shellcheck disable=SC2016
    unshare --uts --mount sh -c 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"' \
        "$name" "$folder/etc/hosts" "$@"
}
node_start() {
    on_node "$1" "$folder/bin/slurmd" -N "$1" -d "$folder/bin/slurmstepd" 2>> "$folder/log/slurmd-$1.err" ||
        die "slurmd of $1: $(tail -2 "$folder/log/slurmd-$1.err")"
}

start_accounting() {
    chown -R mysql "$folder/mysql"; chmod 1777 "$folder/run"
    [ -d "$folder/mysql/mysql" ] || mariadb-install-db --no-defaults --user=mysql --datadir="$folder/mysql" \
        --auth-root-authentication-method=socket --skip-test-db > "$folder/log/mariadb-install.log" 2>&1
    alive mariadbd || setsid mariadbd --no-defaults --user=mysql --datadir="$folder/mysql" --skip-networking \
        --socket="$folder/run/mysql.sock" --pid-file="$folder/run/mariadbd.pid" --innodb-buffer-pool-size=64M \
        --innodb-flush-log-at-trx-commit=0 --log-error="$folder/log/mariadbd.log" < /dev/null > /dev/null 2>&1 &
    wait_for 20 mariadb --no-defaults -S "$folder/run/mysql.sock" -e 'create database if not exists slurm_acct' ||
        die "mariadb did not come up: $folder/log/mariadbd.log"
    # slurmdbd takes the socket from this variable or from my.cnf
    alive slurmdbd || MYSQL_UNIX_PORT=$folder/run/mysql.sock slurmdbd 2> "$folder/log/slurmdbd.err" ||
        die "slurmdbd: $(cat "$folder/log/slurmdbd.err")"
    wait_for 20 sacctmgr -n show cluster || die "slurmdbd does not answer: $folder/log/slurmdbd.log"
}

start() {
    local i
    [ "$(id -u)" = 0 ] || die "run it as root"
    command -v slurmctld slurmd munged sbatch > /dev/null || die "Slurm is not installed: $0 install"
    configure
    if ! alive munged; then
        rm -f "$folder"/run/munge.sock*
        munged --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.sock" --seed-file="$folder/run/munged.seed" \
            --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" || die "munged did not start"
    fi
    [ "$accounting" = 1 ] && start_accounting
    alive slurmctld || "$folder/bin/slurmctld" 2> "$folder/log/slurmctld.err" ||
        die "slurmctld: $(tail -3 "$folder/log/slurmctld.err")"
    for i in $(seq 1 "$nodes"); do alive "slurmd-node$i" || node_start "node$i"; done
    wait_for 30 all_up || { sinfo >&2; die "not all nodes came up: $folder/log"; }
    say "up: $nodes nodes x $cpus cpus x $gpus gpus, SLURM_CONF=$SLURM_CONF"
}

end_daemon() {
    local pid
    if alive "$1"; then
        pid=$(pid_of "$1"); kill "$pid"
        wait_for 10 eval "! kill -0 $pid" || { say "$1 ($pid) did not end: SIGKILL"; kill -9 "$pid"; }
    fi
    rm -f "$folder/run/$1.pid"
}

stop() {
    local file
    [ -d "$folder/run" ] || return 0
    alive slurmctld && scancel -u root > /dev/null 2>&1 && wait_for 10 eval '[ -z "$(squeue -h)" ]'
    # all at once first: a slurmd takes seconds to end
    for file in "$folder"/run/slurmd-*.pid; do alive "$(basename "$file" .pid)" && kill "$(cat "$file")"; done
    for file in "$folder"/run/slurmd-*.pid; do [ -e "$file" ] && end_daemon "$(basename "$file" .pid)"; done
    for file in slurmctld slurmdbd mariadbd munged; do end_daemon $file; done
}

case "${1:-}" in
    install | start | stop) "$1" ;;
    node-start) node_start "${2:?which node?}" ;;
    node-kill) alive "slurmd-${2:?which node?}" && kill -9 "$(pid_of "slurmd-$2")" ;;
    env) echo "export SLURM_CONF=$SLURM_CONF" ;;
    status) sinfo -N -o '%N %T %c %G' && squeue ;;
    *) sed -n '2,/^set -u/p' "$0" | grep '^#' ; exit 2 ;;
esac
