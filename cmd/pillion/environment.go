package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
)

const (
	environmentAnnotation = "pillion.dev/environment" // the variables that can set a flag
	setByAnnotation       = "pillion.dev/set-by"      // the variable that has set it
)

// twin adds environment variables to a flag and its help, in order of precedence. They apply if the command line does not
// set the flag. An unknown flag is a bug in this package, and panics.
func twin(flags *pflag.FlagSet, name string, variables ...string) {
	flag := flags.Lookup(name)
	if flag == nil {
		panic("no flag --" + name)
	}
	flag.Usage += " [$" + strings.Join(variables, ", $") + "]"
	if err := flags.SetAnnotation(name, environmentAnnotation, variables); err != nil {
		panic(err)
	}
}

// applyEnvironment sets each flag that is not on the command line from the first of its variables that is set. An empty
// variable counts as unset, since manifests often contain empty ones. The first invalid value is a valueError that names
// the variable.
func applyEnvironment(flags *pflag.FlagSet) error {
	var failed error
	flags.VisitAll(func(flag *pflag.Flag) {
		if flag.Changed || failed != nil {
			return
		}
		for _, variable := range flag.Annotations[environmentAnnotation] {
			value, ok := os.LookupEnv(variable)
			if !ok || value == "" {
				continue
			}
			if err := flags.Set(flag.Name, value); err != nil {
				failed = valueError{fmt.Errorf("environment variable %s=%s (for --%s): %w", variable, capture.Quoted(value), flag.Name, cause(err))}
				return
			}
			flag.Annotations[setByAnnotation] = []string{variable}
			return
		}
	})
	return failed
}

// flagNames lists the flags in the order in which they were added.
func flagNames(flags *pflag.FlagSet) []string {
	var names []string
	flags.VisitAll(func(flag *pflag.Flag) { names = append(names, flag.Name) })
	return names
}
