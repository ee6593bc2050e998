package iptables

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// complaint is what a program wrote to stderr, as one line, without the advice to read its manual.
func complaint(stderr string) string {
	var lines []string
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "Try `") && !strings.HasPrefix(line, "Error occurred at line") {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// What a program's failure comes down to, and the remedy.
var (
	// errNoKernelSupport means that the kernel lacks what a table needs, as opposed to a rule that is wrong.
	errNoKernelSupport = errors.New("the kernel does not support it: load the modules nf_tables, nft_chain_nat and nft_compat on the node, or for the legacy flavour iptable_nat and ip6table_nat")

	errNotPermitted = errors.New("this process may not change rules: give it the capabilities NET_ADMIN and NET_RAW; if it has them, a policy of seccomp, SELinux or AppArmor forbids it")
	errLockFile     = errors.New("the lock file of iptables cannot be made: mount an emptyDir at /run, or name another place by XTABLES_LOCKFILE")
	errLockHeld     = fmt.Errorf("somebody else has held the lock of iptables for %d seconds: try again", lockSeconds)
	errTooOld       = errors.New("this iptables is too old: 1.6.2 or later is needed")
	errNoExtension  = errors.New("this iptables lacks an extension: install its whole package, in which /usr/lib/…/xtables belongs to it")
)

// diagnoses are tried in this order on what a program wrote to stderr.
var diagnoses = []struct {
	says *regexp.Regexp
	is   error
}{
	{regexp.MustCompile(`can't open lock file|[Cc]ould not open lock file`), errLockFile},
	{regexp.MustCompile(`holding the xtables lock`), errLockHeld},
	{regexp.MustCompile(`Failed to initialize nft: Protocol not supported|do you need to insmod|Table does not exist|` +
		`(TABLE|CHAIN)_ADD failed \((Operation not supported|No such file or directory|Invalid argument)\)|` +
		`Could not fetch rule set generation id: Invalid argument`), errNoKernelSupport},
	{regexp.MustCompile(`you must be root|[Pp]ermission denied|Operation not permitted`), errNotPermitted},
	{regexp.MustCompile("(unrecognized|unknown) option [`'\"]?-*(wait|noflush|w\\b)"), errTooOld},
	{regexp.MustCompile("Couldn't load (match|target)|[Uu]nknown option|unrecognized option|unknown arg"), errNoExtension},
	{regexp.MustCompile(`is incompatible, use 'nft' tool`), errIncompatible},
}

// missingModulesError are those of the kernel's modules that a rule needs, at least one of which is missing.
type missingModulesError string

func (e missingModulesError) Error() string {
	return fmt.Sprintf("the kernel lacks a part of this rule: load the modules %s on the node", string(e))
}

// lacksSomething tells that iptables cannot be used here, for reasons that need not concern nftables.
func lacksSomething(err error) bool {
	lacks := func(target error) bool { return errors.Is(err, target) }
	return slices.ContainsFunc([]error{errNoKernelSupport, errNoExtension, errLockFile, needsNETRAW}, lacks) ||
		errors.As(err, new(missingModulesError))
}

// diagnose says what the failure of a program comes down to, in which the line of its input at which it stopped may tell
// which part of the kernel is missing; nil if nobody knows.
func diagnose(stderr, line string) error {
	for _, d := range diagnoses {
		if d.says.MatchString(stderr) {
			return d.is
		}
	}
	refused := regexp.MustCompile(`RULE_\w+ failed \((No such file or directory|Operation not supported|Protocol not supported)\)|` +
		`No chain/target/match by that name|missing kernel module`)
	if modules := modulesFor(line); refused.MatchString(stderr) && len(modules) > 0 {
		return missingModulesError(strings.Join(modules, ", "))
	}
	return nil
}

// modulesFor are the kernel's modules for the matches and the target of a rule.
func modulesFor(line string) []string {
	var modules []string
	words := splitWords(line)
	for i, word := range words[:max(len(words)-1, 0)] {
		name := words[i+1]
		switch {
		case word == "-m" && name != string(TCP) && name != string(UDP),
			word == "-j" && !strings.HasPrefix(name, ownPrefix) && !slices.Contains([]string{policyAccept, policyDrop, "RETURN"}, name):
			modules = append(modules, "xt_"+name)
		}
	}
	return modules
}
