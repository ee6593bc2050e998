package xtables

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"

	"github.com/pillion-proxy/pillion/iptables/kernel"
	"github.com/pillion-proxy/pillion/iptables/ruleset"
)

// complaint returns a program's stderr as one line, without the advice to read the manual.
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

// The other causes of a program's failure, with their remedies.
var (
	errRefused     = errors.New("the kernel has refused it") // kernel.Refused returns the cause
	errLockFile    = errors.New("cannot create the lock file of iptables: mount an emptyDir at /run, or set XTABLES_LOCKFILE to another path")
	errLockHeld    = fmt.Errorf("another program has held the xtables lock for %d seconds: try again", lockSeconds)
	errTooOld      = errors.New("this iptables is too old: 1.6.2 or later is needed")
	errNoExtension = errors.New("this iptables lacks an extension: install its whole package, including /usr/lib/…/xtables")
)

// diagnoses match the stderr of programs. The first match wins. They are compiled when a program has failed, because a run
// without a failure would spend much of its time on that.
var diagnoses = sync.OnceValue(func() []diagnosis {
	return []diagnosis{
		{regexp.MustCompile(`can't open lock file|[Cc]ould not open lock file`), errLockFile},
		{regexp.MustCompile(`holding the xtables lock`), errLockHeld},
		{regexp.MustCompile(`Failed to initialize nft: Protocol not supported|do you need to insmod|Table does not exist|` +
			`(TABLE|CHAIN)_ADD failed \((Operation not supported|No such file or directory|Invalid argument)\)|` +
			`Could not fetch rule set generation id: Invalid argument`), kernel.ErrNoKernelSupport},
		{regexp.MustCompile(`you must be root|[Pp]ermission denied|Operation not permitted`), errRefused},
		{regexp.MustCompile("(unrecognized|unknown) option [`'\"]?-*(wait|noflush|w\\b)"), errTooOld},
		{regexp.MustCompile("Couldn't load (match|target)|[Uu]nknown option|unrecognized option|unknown arg"), errNoExtension},
		{regexp.MustCompile(`is incompatible, use 'nft' tool`), ErrIncompatible},
	}
})

type diagnosis struct {
	text *regexp.Regexp
	is   error
}

// missingModulesError lists the kernel modules of a rule's matches and target. At least one of them is missing.
type missingModulesError string

func (e missingModulesError) Error() string {
	return fmt.Sprintf("the kernel lacks support for this rule: load the modules %s on the node", string(e))
}

// Lacks reports whether err means that iptables lacks something here that nftables may not need.
func Lacks(err error) bool {
	lacks := func(target error) bool { return errors.Is(err, target) }
	return slices.ContainsFunc([]error{kernel.ErrNoKernelSupport, errNoExtension, errLockFile, kernel.NeedsNetRaw}, lacks) ||
		errors.As(err, new(missingModulesError))
}

// diagnose returns the cause of a program's failure, or nil if it is unknown. line is the line of input at which the
// program stopped; its matches and target show which module may be missing.
func diagnose(stderr, line string) error {
	for _, d := range diagnoses() {
		if !d.text.MatchString(stderr) {
			continue
		}
		if d.is == errRefused {
			return kernel.Refused(strings.Contains(stderr, "(legacy)"))
		}
		return d.is
	}
	refused := regexp.MustCompile(`RULE_\w+ failed \((No such file or directory|Operation not supported|Protocol not supported)\)|` +
		`No chain/target/match by that name|missing kernel module`)
	if modules := modulesFor(line); refused.MatchString(stderr) && len(modules) > 0 {
		return missingModulesError(strings.Join(modules, ", "))
	}
	return nil
}

// modulesFor returns the kernel modules of a rule's matches and target.
func modulesFor(line string) []string {
	var modules []string
	words := ruleset.SplitWords(line)
	for i, word := range words[:max(len(words)-1, 0)] {
		name := words[i+1]
		switch {
		case word == "-m" && name != string(ruleset.TCP) && name != string(ruleset.UDP),
			word == "-j" && !strings.HasPrefix(name, ruleset.OwnPrefix) && !slices.Contains([]string{ruleset.PolicyAccept, ruleset.PolicyDrop, "RETURN"}, name):
			modules = append(modules, "xt_"+name)
		}
	}
	return modules
}

var ErrIncompatible = errors.New("an nftables table has rules that were made with nft and that iptables cannot show; move them to a table with another name")
