package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/pillion-proxy/pillion/internal/capture"
	"github.com/pillion-proxy/pillion/internal/commandline"
)

// parsed adds a flag that is parsed when it is set, so that an error names the flag or variable. text is the default as
// help shows it, and *into must already hold its value.
func parsed[T any](flags *pflag.FlagSet, into *T, parse func(string) (T, error), name, short, text, kind, usage string) *pflag.Flag {
	return flags.VarPF(&parsedValue[T]{into: into, parse: parse, text: text, kind: kind}, name, short, usage)
}

// parsedSwitch adds a boolean flag. Its default is *into; without a value it is true.
func parsedSwitch(flags *pflag.FlagSet, into *bool, name, short, usage string) {
	parsed(flags, into, parseSwitch, name, short, strconv.FormatBool(*into), "bool", usage).NoOptDefVal = "true"
}

func parseSwitch(text string) (bool, error) {
	on, err := strconv.ParseBool(text)
	if err != nil {
		return false, fmt.Errorf("%s is not a boolean: use true or false", capture.Quoted(text))
	}
	return on, nil
}

type parsedValue[T any] struct {
	into  *T
	parse func(string) (T, error)
	text  string
	kind  string
}

func (v *parsedValue[T]) String() string { return v.text }
func (v *parsedValue[T]) Type() string   { return v.kind }

func (v *parsedValue[T]) Set(text string) error {
	value, err := v.parse(text)
	if err == nil {
		*v.into, v.text = value, text
	}
	return err
}

var noArguments = commandline.NoArguments

// shortened cuts the value that pflag repeats in an error.
func shortened(err error) error {
	var invalid *pflag.InvalidValueError
	if !errors.As(err, &invalid) {
		return err
	}
	return &namedError{strings.Replace(err.Error(), strconv.Quote(invalid.GetValue()), capture.Quoted(invalid.GetValue()), 1), err}
}

// cause returns the error of a flag's parser without what pflag adds, the flag and the value.
func cause(err error) error {
	var invalid *pflag.InvalidValueError
	if errors.As(err, &invalid) {
		return errors.Unwrap(invalid)
	}
	return err
}

// flagError distinguishes an invalid value from an invalid command line. istio-iptables counts the values that its flags
// parse themselves as invalid command lines.
func flagError(cmd *cobra.Command, err error) error {
	if usage := commandline.FlagError(cmd, err); usage != nil {
		return usage
	}
	err = shortened(err)
	var invalid *pflag.InvalidValueError
	formal := []string{"bool", "uint16", "duration", "level"}
	if errors.As(err, &invalid) && cmd.Name() == istioIPTables && slices.Contains(formal, invalid.GetFlag().Value.Type()) {
		return usageError{Err: err}
	}
	return valueError{err}
}
