package metrics

import (
	"os"
	"strconv"
	"strings"
	"syscall"
)

// ticksPerSecond is the unit of times in /proc (USER_HZ): 100 on every architecture that Go supports.
const ticksPerSecond = 100

// process adds the metrics of the process, from /proc (proc_pid_stat(5), proc_stat(5)).
func (f *families) process() {
	f.fromStat()
	if directory, err := os.Open("/proc/self/fd"); err == nil {
		names, err := directory.Readdirnames(-1)
		directory.Close()
		if err == nil {
			f.gauge("process_open_fds", "Number of open file descriptors.").is(float64(len(names)))
		}
	}
	f.limit("process_max_fds", "Maximum number of open file descriptors.", syscall.RLIMIT_NOFILE)
	f.limit("process_virtual_memory_max_bytes", "Maximum amount of virtual memory available in bytes.", syscall.RLIMIT_AS)
	if received, sent, ok := networkBytes(); ok {
		f.counter("process_network_receive_bytes_total", "Number of bytes received by the process over the network.").is(received)
		f.counter("process_network_transmit_bytes_total", "Number of bytes sent by the process over the network.").is(sent)
	}
}

// fromStat adds what /proc/self/stat has. Its second field is the program's name in parentheses; the third is at index 0.
func (f *families) fromStat() {
	text, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		return
	}
	line := string(text)
	fields := strings.Fields(line[strings.LastIndexByte(line, ')')+1:])
	const userTime, systemTime, startTime, size, resident = 11, 12, 19, 20, 21
	if len(fields) <= resident {
		return
	}
	f.counter("process_cpu_seconds_total", "Total user and system CPU time spent in seconds.").
		is((parse(fields[userTime]) + parse(fields[systemTime])) / ticksPerSecond)
	f.gauge("process_virtual_memory_bytes", "Virtual memory size in bytes.").is(parse(fields[size]))
	f.gauge("process_resident_memory_bytes", "Resident memory size in bytes.").is(parse(fields[resident]) * float64(os.Getpagesize()))
	if booted := bootTime(); booted > 0 {
		f.gauge("process_start_time_seconds", "Start time of the process since unix epoch in seconds.").
			is(booted + parse(fields[startTime])/ticksPerSecond)
	}
}

// parse returns the number in a field of the kernel, or 0.
func parse(field string) float64 {
	n, _ := strconv.ParseFloat(field, 64)
	return n
}

// bootTime returns the time at which the system started, in seconds since 1970, or 0 if the kernel does not supply it.
func bootTime() float64 {
	text, _ := os.ReadFile("/proc/stat")
	for line := range strings.Lines(string(text)) {
		if seconds, ok := strings.CutPrefix(line, "btime "); ok {
			return parse(strings.TrimSpace(seconds))
		}
	}
	return 0
}

func (f *families) limit(name, help string, resource int) {
	var limit syscall.Rlimit
	if syscall.Getrlimit(resource, &limit) == nil {
		f.gauge(name, help).is(float64(limit.Cur))
	}
}

// networkBytes returns the bytes of IP packets that this network namespace received and sent. The kernel prints a line with
// the names of the numbers above a line with the numbers.
func networkBytes() (received, sent float64, ok bool) {
	text, err := os.ReadFile("/proc/self/net/netstat")
	if err != nil {
		return 0, 0, false
	}
	var names []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != "IpExt:" {
			continue
		}
		if names == nil {
			names = fields
			continue
		}
		for i := range min(len(names), len(fields)) {
			switch names[i] {
			case "InOctets":
				received = parse(fields[i])
			case "OutOctets":
				sent = parse(fields[i])
			}
		}
	}
	return received, sent, true
}
