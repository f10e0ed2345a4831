#!/usr/bin/env bash
# A real Slurm on one machine, for tests: a controller and several nodes, no systemd, loopback only.
#
#   launch/slurm_test_cluster.sh up FOLDER      installs what is missing, starts, waits until idle
#   launch/slurm_test_cluster.sh down FOLDER    ends what it started and removes FOLDER
#   launch/slurm_test_cluster.sh crash FOLDER   ends the controller as a power cut would (kill -9)
#   launch/slurm_test_cluster.sh controller FOLDER   starts it again
#
# `up` may be repeated: it starts what does not run and heals nodes that are down. Everything is in
# FOLDER; then `export SLURM_CONF=FOLDER/slurm.conf`. Needs root, and apt where Slurm is not there.
# NODES=2 and CPUS=2 (of each node) pretend to be a cluster; PORT=17300 is the first of NODES+1.
# No accounting: that is the harder case, and many clusters let nobody read theirs.
set -euo pipefail

NODES=${NODES:-2} CPUS=${CPUS:-2} PORT=${PORT:-17300}
MARK="# onset test cluster"

die() { echo "slurm_test_cluster: $*" >&2; exit 2; }

[ $# -eq 2 ] || die "give a verb (up, down, crash, controller) and a folder"
verb=$1 root=$(realpath -m -- "$2")
case $root in *[!A-Za-z0-9/._-]*) die "$root has a character that slurm.conf cannot hold" ;; esac
export SLURM_CONF=$root/slurm.conf

# A pid counts only if it is still the daemon that wrote it: numbers are used again.
running() {
  [ -s "$root/run/$1.pid" ] && [ "$(cat "/proc/$(cat "$root/run/$1.pid")/comm" 2>/dev/null)" = "$2" ]
}

end() {
  running "$1" "$2" || return 0
  local pid
  pid=$(cat "$root/run/$1.pid")
  kill "${3:--TERM}" "$pid" 2>/dev/null || true
  for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || return 0; sleep 0.1; done
  kill -KILL "$pid" 2>/dev/null || true
}

until_true() {
  local tenths=$1
  shift
  for _ in $(seq "$tenths"); do "$@" >/dev/null 2>&1 && return 0; sleep 0.1; done
  die "waited $((tenths / 10)) s in vain for: $*; see $root/log"
}

install_slurm() {
  local missing=()
  command -v munged >/dev/null || missing+=(munge)
  command -v sbatch >/dev/null || missing+=(slurm-client)
  command -v slurmctld >/dev/null || missing+=(slurmctld)
  command -v slurmd >/dev/null || missing+=(slurmd)
  [ ${#missing[@]} -eq 0 ] && return 0
  command -v apt-get >/dev/null || die "${missing[*]} missing, and there is no apt-get to install it"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${missing[@]}" >/dev/null
}

configure() {
  mkdir -p "$root"/{run,log,state}
  chmod 755 "$root" "$root"/{run,log,state}
  [ -s "$root/munge.key" ] || (umask 077; head -c 128 /dev/urandom >"$root/munge.key")
  local host i version preempt=SlurmctldParameters=preempt_send_user_signal
  host=$(hostname -s)
  version=$(slurmctld -V | grep -oE '[0-9]+' | head -1)
  # Slurm 23 and later (not tried) renamed this, and load a plugin for control groups even where
  # nothing uses one.
  if [ "$version" -ge 23 ]; then
    preempt=PreemptParameters=send_user_signal
    echo "CgroupPlugin=disabled" >"$root/cgroup.conf"
  fi
  # jax.distributed calls the first node by its name.
  getent hosts "$host" >/dev/null || echo "127.0.0.1 $host $MARK" >>/etc/hosts
  for i in $(seq "$NODES"); do
    getent hosts "onset$i" >/dev/null || echo "127.0.0.1 onset$i $MARK" >>/etc/hosts
    mkdir -p "$root/spool.onset$i"
  done
  {
    cat <<CONF
ClusterName=onset
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is put back waits until its old credential has expired: 120 s if nothing is said.
# KillWait must stay far below it, or the new start meets the old one and the node is drained.
AuthInfo=socket=$root/run/munge.sock,cred_expire=10
KillWait=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$root/state
SlurmdSpoolDir=$root/spool.%n
SlurmctldPidFile=$root/run/slurmctld.pid
SlurmdPidFile=$root/run/%n.pid
SlurmctldLogFile=$root/log/slurmctld.log
SlurmdLogFile=$root/log/%n.log
# No control groups: containers seldom allow them.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=0
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Without it a batch script hears nothing when its GraceTime begins.
$preempt
JobRequeue=1
MaxArraySize=1001
MinJobAge=300
SlurmctldTimeout=30
SlurmdTimeout=30
InactiveLimit=0
# Numbers must not begin at 1 again after FOLDER was removed: from the clock, one every ten seconds.
FirstJobId=$(( ($(date +%s) - 1700000000) / 10 % 60000000 + 1000 ))
# The machine may claim more nodes and processors than it has.
SlurmdParameters=config_overrides
CONF
    for i in $(seq "$NODES"); do
      echo "NodeName=onset$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + i))" \
        "CPUs=$CPUS RealMemory=8000 State=UNKNOWN"
    done
    cat <<CONF
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=polite Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
  } >"$root/slurm.conf.new"
  mv "$root/slurm.conf.new" "$root/slurm.conf"
}

controller() {
  running slurmctld slurmctld || slurmctld -i
  until_true 200 sh -c 'scontrol ping | grep -q "is UP"'
}

up() {
  [ "$(id -u)" = 0 ] || die "needs root"
  install_slurm
  configure
  local i
  if ! running munged munged; then
    rm -f "$root"/run/munge.sock*
    munged --force --key-file="$root/munge.key" --socket="$root/run/munge.sock" \
      --pid-file="$root/run/munged.pid" --log-file="$root/log/munged.log" \
      --seed-file="$root/run/munge.seed"
  fi
  until_true 100 sh -c "munge -n -S $root/run/munge.sock | unmunge -S $root/run/munge.sock"
  controller
  for i in $(seq "$NODES"); do
    running "onset$i" slurmd || slurmd -N "onset$i"
    case $(sinfo -h -n "onset$i" -p main -o %T) in
      drain* | down*) scontrol update "nodename=onset$i" state=resume || true ;;
    esac
  done
  until_true 300 sh -c \
    "[ \$(sinfo -h -N -p main -o %T | grep -cE '^(idle|allocated|mixed)') -ge $NODES ]"
  echo "export SLURM_CONF=$SLURM_CONF"
}

down() {
  [ -e "$root" ] || return 0
  grep -q '^ClusterName=onset$' "$root/slurm.conf" || die "$root holds no test cluster"
  timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
  local file
  end slurmctld slurmctld
  for file in "$root"/run/onset*.pid; do
    [ -e "$file" ] && end "$(basename "$file" .pid)" slurmd
  done
  end munged munged
  # What the jobs of a node left behind would write into a folder that is gone.
  sed "/$MARK\$/d" /etc/hosts >"$root/hosts" && cat "$root/hosts" >/etc/hosts
  rm -rf -- "$root"
}

case $verb in
  up | down | controller) "$verb" ;;
  crash) end slurmctld slurmctld -KILL ;;
  *) die "$verb is not a verb; there are up, down, crash and controller" ;;
esac
